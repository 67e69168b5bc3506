//! The kernel's words, from `<linux/userfaultfd.h>`; a Python test compares them with the header.

pub const UFFDIO_COPY: u64 = 0xc028_aa03;
pub const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
pub const UFFDIO_WAKE: u64 = 0x8010_aa02;
pub const UFFDIO_POISON: u64 = 0xc020_aa08; // Linux 6.6

pub const EVENT_PAGEFAULT: u8 = 0x12;
pub const EVENT_FORK: u8 = 0x13;
pub const EVENT_REMOVE: u8 = 0x15;
pub const EVENT_UNMAP: u8 = 0x16;

/// `struct uffdio_range`.
#[repr(C)]
pub struct Range {
    pub start: u64,
    pub len: u64,
}

/// `struct uffdio_copy`; `copy` comes back as bytes copied, or as a negative errno.
#[repr(C)]
pub struct Copy {
    pub dst: u64,
    pub src: u64,
    pub len: u64,
    pub mode: u64,
    pub copy: i64,
}

/// `struct uffdio_zeropage` and `struct uffdio_poison`, which have the same shape.
#[repr(C)]
pub struct Fill {
    pub range: Range,
    pub mode: u64,
    pub done: i64,
}

/// `struct uffd_msg`, 32 bytes. `first` and `second` are flags and address of a page fault, or
/// start and end of a REMOVE or UNMAP, or the descriptor of a FORK.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Message {
    pub event: u8,
    _reserved: [u8; 7],
    pub first: u64,
    pub second: u64,
    _third: u64,
}

const _: () = assert!(size_of::<Message>() == 32 && size_of::<Copy>() == 40 && size_of::<Fill>() == 32);
