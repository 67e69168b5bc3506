# Entry: Firecracker jumps here in 64-bit mode, ring 0, interrupts off, rsi = zero page, first GiB identity-mapped.
#
# Ring 0 is left as fast as possible: under a paravirtual (nested) KVM each of its instructions is emulated, ring 3 runs
# natively everywhere. So only what ring 3 cannot do for itself is done here: open the page that holds this image to
# ring 3, map the VMM's device registers in place of RAM that is not used here (which takes the flush that CR3 brings),
# load a GDT that has ring-3 segments, leave with IOPL 3 so that ports work. All else is C in ring 3.

        .section .start, "ax"
        .globl  _start
_start:
        mov     %rsi, %rdi              # boot(zero_page, page_table_root)
        mov     %cr3, %rsi
        orb     $4, (%rsi)              # U bit, level by level, for the first 2 MiB
        mov     (%rsi), %rax
        and     $-4096, %rax
        orb     $4, (%rax)
        mov     (%rax), %rax
        and     $-4096, %rax
        orb     $4, (%rax)
        movl    $0xd00000e7, 8(%rax)    # device registers at 2 MiB and 4 MiB: large pages, open to ring 3; the upper
        movl    $0xc00000e7, 16(%rax)   # halves of the entries are zero
        mov     %rsi, %cr3
        lgdt    gdt_pointer
        mov     $stack_top - 8, %esp    # as if called: rsp + 8 is a multiple of 16
        pushq   $0x23
        pushq   $stack_top - 8
        pushq   $0x3002                 # IOPL 3, interrupts off
        pushq   $0x1b
        pushq   $boot
        iretq

        .balign 8                       # accessed bits are set already: nobody ever writes here
gdt:    .quad   0
        .quad   0x00af9b000000ffff      # 0x08 ring-0 code
        .quad   0x00cf93000000ffff      # 0x10 ring-0 data
        .quad   0x00affb000000ffff      # 0x18 ring-3 code
        .quad   0x00cff3000000ffff      # 0x20 ring-3 data
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .quad   gdt

        .section .note.GNU-stack, "", @progbits
