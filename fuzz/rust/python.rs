//! The Python interpreter with the core built in: a sanitizer's runtime must be in the program itself.

use std::ffi::{CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStringExt;

use vmd_core as _;

unsafe extern "C" {
    fn PyInit_vmd_core() -> *mut c_void;
    fn PyImport_AppendInittab(name: *const c_char, init: unsafe extern "C" fn() -> *mut c_void) -> c_int;
    fn Py_BytesMain(count: c_int, arguments: *mut *mut c_char) -> c_int;
}

fn main() {
    // ThreadSanitizer starts a thread of its own beside the first one: before anybody counts threads.
    std::thread::spawn(|| {}).join().expect("it does nothing");
    let arguments = std::env::args_os().map(|argument| CString::new(argument.into_vec()).expect("the kernel's"));
    let mut arguments: Vec<_> = arguments.map(CString::into_raw).collect();
    // SAFETY: before the interpreter is there, as it must be; the name is a valid string.
    let added = unsafe { PyImport_AppendInittab(c"vmd_core".as_ptr(), PyInit_vmd_core) };
    assert_eq!(added, 0);
    // SAFETY: valid strings, which are never freed.
    let code = unsafe { Py_BytesMain(arguments.len() as c_int, arguments.as_mut_ptr()) };
    std::process::exit(code);
}
