//! The words that the agent's few BPF programs are written in.

use crate::sys::BpfInstruction;

// Operations of include/uapi/linux/bpf.h, class and source in the low bits.
pub(crate) const LOAD_WORD: u8 = 0x61; // LDX | MEM | W
pub(crate) const STORE_WORD: u8 = 0x63; // STX | MEM | W
pub(crate) const MOVE_REGISTER: u8 = 0xbf; // ALU64 | MOV | X
pub(crate) const MOVE_CONSTANT: u8 = 0xb7; // ALU64 | MOV | K
pub(crate) const AND_CONSTANT: u8 = 0x57; // ALU64 | AND | K
pub(crate) const SHIFT_RIGHT: u8 = 0x77; // ALU64 | RSH | K
pub(crate) const JUMP_IF_EQUAL: u8 = 0x15; // JMP | JEQ | K
pub(crate) const JUMP_IF_NOT_EQUAL: u8 = 0x55; // JMP | JNE | K
pub(crate) const EXIT: u8 = 0x95;

// Registers that have a meaning of their own.
pub(crate) const RESULT: u8 = 0;
pub(crate) const CONTEXT: u8 = 1;

/// One instruction.
pub(crate) fn instruction(
    code: u8,
    target: u8,
    source: u8,
    offset: i16,
    immediate: i32,
) -> BpfInstruction {
    BpfInstruction {
        code,
        registers: source << 4 | target,
        offset,
        immediate,
    }
}
