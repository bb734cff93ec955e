//! Reads pickles without running any code.
//!
//! A call of a function or class that a state dict needs gives the tensor or dict that it would
//! make. Any other call gives a placeholder, [`Value::Foreign`], so that a training checkpoint may
//! hold settings and objects of any class beside its weights.
//!
//! All values are in one arena and refer to each other by index, so a deeply nested pickle needs no
//! recursion. Each opcode adds at most one value, and [`MAX_VALUES`] limits the number of values.

mod calls;
mod machine;
mod state_dict;
mod value;

pub(super) use machine::Machine;
pub(super) use state_dict::{StateDict, state_dict};
pub(super) use value::{Arena, Id, Value, View};

/// The most values that a pickle may make. It is enough for ten thousand tensors.
const MAX_VALUES: usize = 1 << 18;
/// The next three limits bound what each tensor copies. A few bytes of a pickle can refer many
/// times to a long string or tuple; with the limits, memory stays in proportion to the file.
const MAX_KEY_BYTES: usize = 64;
const MAX_NAME_BYTES: usize = 1 << 10;
const MAX_DIMS: usize = 16;

/// The reason why a pickle is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PickleError {
    /// It holds an object of this class in place of tensors.
    Global(String),
    /// It holds no named tensor; the keys of its outermost dict.
    NoTensors(Vec<String>),
    /// It holds several state dicts, below these keys.
    Several(Vec<String>),
    /// It is cut off, contradicts itself, or uses an opcode that is not supported.
    Corrupt(String),
}

impl From<&str> for PickleError {
    fn from(reason: &str) -> Self {
        PickleError::Corrupt(reason.to_owned())
    }
}

type Result<T> = std::result::Result<T, PickleError>;

/// Reads the one pickle in `bytes` and returns the weights in it.
pub(super) fn weights(bytes: &[u8]) -> Result<StateDict> {
    let (values, top, _) = Machine::run(bytes)?;
    state_dict(&values, top)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_global_is_named_and_not_run() {
        let pickle = b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.";
        assert_eq!(weights(pickle), Err(PickleError::Global("posix.system".into())));
    }

    #[test]
    fn deep_nesting_and_endless_values_are_errors() {
        let deep = [vec![b')'], vec![0x85; 1 << 19], vec![b'.']].concat();
        assert!(matches!(weights(&deep), Err(PickleError::Corrupt(_))));
        for opcode in [b'N', b'('] {
            let many = vec![opcode; MAX_VALUES + 2];
            assert!(matches!(weights(&many), Err(PickleError::Corrupt(_))));
        }
        let recalled = [b"Nq\x00".to_vec(), b"h\x00".repeat(MAX_VALUES + 1)].concat();
        assert!(matches!(weights(&recalled), Err(PickleError::Corrupt(_))));
    }

    #[test]
    fn long_integers_are_signed() {
        for (bytes, value) in [
            (&b"\x8a\x00."[..], Value::Int(0)),
            (b"\x8a\x01\xff.", Value::Int(-1)),
            (b"\x8a\x08\xfe\xff\xff\xff\xff\xff\xff\xff.", Value::Int(-2)),
            (b"\x8a\x05\x00\x00\x00\x00\x01.", Value::Int(1 << 32)),
            (b"J\xfe\xff\xff\xff.", Value::Int(-2)),
        ] {
            let (values, id, _) = Machine::run(bytes).unwrap();
            assert_eq!(format!("{:?}", values.get(id)), format!("{value:?}"));
        }
    }
}
