//! Frozen bytes, hostile bytes.

use std::{collections::BTreeSet, fs, path::PathBuf};

use proptest::prelude::*;

use crate::{
    ids::Epoch,
    wire::{
        KINDS, Kind, Message,
        admin::{ErrorReply, ModelListReply, StatusReply, StatusRequest},
        frame::{self, FrameError, HEADER_LEN, Header},
        generate::{GenerateRequest, Input},
        samples,
    },
};

/// Set to rewrite the files of `testdata/`.
const REWRITE_VAR: &str = "DSD_REWRITE_GOLDEN";

macro_rules! for_each_sample {
    ($check:ident $(, $arg:expr)*) => {
        $check(&samples::error_reply() $(, $arg)*);
        $check(&samples::status_request() $(, $arg)*);
        $check(&samples::status_reply() $(, $arg)*);
        $check(&samples::model_list_request() $(, $arg)*);
        $check(&samples::model_list_reply() $(, $arg)*);
        $check(&samples::model_load_request() $(, $arg)*);
        $check(&samples::model_load_reply() $(, $arg)*);
        $check(&samples::model_unload_request() $(, $arg)*);
        $check(&samples::model_unload_reply() $(, $arg)*);
        $check(&samples::model_verify_request() $(, $arg)*);
        $check(&samples::model_verify_reply() $(, $arg)*);
        $check(&samples::progress() $(, $arg)*);
        $check(&samples::tenant_list_request() $(, $arg)*);
        $check(&samples::tenant_list_reply() $(, $arg)*);
        $check(&samples::tenant_show_request() $(, $arg)*);
        $check(&samples::tenant_show_reply() $(, $arg)*);
        $check(&samples::tenant_add_request() $(, $arg)*);
        $check(&samples::tenant_set_request() $(, $arg)*);
        $check(&samples::tenant_rotate_key_request() $(, $arg)*);
        $check(&samples::tenant_key_reply() $(, $arg)*);
        $check(&samples::tenant_remove_request() $(, $arg)*);
        $check(&samples::tenant_remove_reply() $(, $arg)*);
        $check(&samples::generate_request() $(, $arg)*);
        $check(&samples::generate_delta() $(, $arg)*);
        $check(&samples::generate_done() $(, $arg)*);
        $check(&samples::rank_start() $(, $arg)*);
        $check(&samples::rank_ready() $(, $arg)*);
        $check(&samples::rank_failed() $(, $arg)*);
        $check(&samples::rank_fault() $(, $arg)*);
        $check(&samples::group_submit() $(, $arg)*);
        $check(&samples::group_cancel() $(, $arg)*);
        $check(&samples::group_stop() $(, $arg)*);
        $check(&samples::group_events() $(, $arg)*);
        $check(&samples::group_tick() $(, $arg)*);
        $check(&samples::agent_tick() $(, $arg)*);
    };
}

fn golden_path(name: &str, version: u16) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata");
    folder.join(format!("{name}.v{version}.bin"))
}

fn check_golden<M: Message + PartialEq + std::fmt::Debug>(sample: &M) {
    let path = golden_path(M::NAME, M::VERSION);
    let bytes = frame::encode(sample, Epoch(7)).unwrap();
    if std::env::var_os(REWRITE_VAR).is_some() {
        fs::write(&path, &bytes).unwrap();
    }
    let golden = fs::read(&path).unwrap();
    let (header, message) = frame::decode::<M>(&golden).unwrap();
    assert_eq!(header.epoch, Epoch(7), "{}", M::NAME);
    assert_eq!(&message, sample, "{}", M::NAME);
    assert_eq!(
        bytes,
        golden,
        "the bytes of {} changed: raise its version",
        M::NAME
    );
}

#[test]
fn frozen_bytes_of_every_message_decode_and_encode_as_before() {
    for_each_sample!(check_golden);
}

#[test]
fn every_message_has_frozen_bytes_and_its_own_number() {
    let numbers: BTreeSet<u16> = KINDS.iter().map(|kind| kind.type_id).collect();
    assert_eq!(numbers.len(), KINDS.len());
    for kind in KINDS {
        assert!(
            golden_path(kind.name, kind.version).exists(),
            "{}",
            kind.name
        );
    }
}

fn check_header(change: impl Fn(&mut [u8; HEADER_LEN]), expected: &FrameError) {
    let mut bytes = frame::encode(&samples::status_reply(), Epoch(0)).unwrap();
    let head = bytes.first_chunk_mut::<HEADER_LEN>().unwrap();
    change(head);
    assert_eq!(frame::decode::<StatusReply>(&bytes).unwrap_err(), *expected);
}

#[test]
fn a_header_that_is_off_is_refused_by_name() {
    let kind = Kind::of::<StatusReply>();
    let max = kind.class.body_len_max();
    check_header(|h| h[0] = b'x', &FrameError::BadMagic { found: 0x7378 });
    check_header(|h| h[2] = 2, &FrameError::BadHeaderVersion { found: 2 });
    check_header(
        |h| h[3] = 1,
        &FrameError::ReservedBits {
            flags: 1,
            reserved: 0,
        },
    );
    check_header(
        |h| h[31] = 1,
        &FrameError::ReservedBits {
            flags: 0,
            reserved: 1 << 24,
        },
    );
    check_header(|h| h[4] = 0x01, &FrameError::UnknownType { found: 0x0101 });
    check_header(
        |h| h[6] = 9,
        &FrameError::WrongVersion {
            name: "StatusReply",
            found: 9,
            expected: 1,
        },
    );
    check_header(
        |h| h[8] ^= 1,
        &FrameError::WrongSchema {
            name: "StatusReply",
            found: kind.schema_hash ^ 1,
            expected: kind.schema_hash,
        },
    );
    check_header(
        |h| h[24] = 1,
        &FrameError::TooLong {
            part: "tail",
            found: 1,
            max: 0,
        },
    );
    check_header(
        |h| h[20..24].copy_from_slice(&(max + 1).to_le_bytes()),
        &FrameError::TooLong {
            part: "body",
            found: max + 1,
            max,
        },
    );
    check_header(
        |h| h[20..24].copy_from_slice(&u32::MAX.to_le_bytes()),
        &FrameError::TooLong {
            part: "body",
            found: u32::MAX,
            max: 4 << 20,
        },
    );
}

#[test]
fn lengths_that_do_not_match_the_bytes_are_refused() {
    let bytes = frame::encode(&samples::error_reply(), Epoch(0)).unwrap();
    for len in 0..bytes.len() {
        let error = frame::decode::<ErrorReply>(&bytes[..len]).unwrap_err();
        assert!(
            matches!(error, FrameError::Truncated { .. }),
            "{len}: {error}"
        );
    }
    let longer = [bytes.as_slice(), b"x"].concat();
    let error = frame::decode::<ErrorReply>(&longer).unwrap_err();
    assert_eq!(error, FrameError::Trailing { n: 1 });
}

#[test]
fn a_message_above_its_class_is_not_sent() {
    let mut request = samples::generate_request();
    request.input = Input::Prompt("a".repeat(4 << 20));
    let error = frame::encode(&request, Epoch(0)).unwrap_err();
    assert!(
        matches!(
            error,
            FrameError::TooLong {
                part: "body",
                max: 4_194_304,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn two_strings_cannot_share_bytes() {
    // 3000 names of 3000 bytes are 9 MB; if archived strings might overlap, a body of 30 KB could
    // unfold to that.
    let mut reply = samples::model_list_reply();
    reply.models.truncate(1);
    reply.models[0].name = "n".repeat(300);
    reply.models[0].path = "p".repeat(300);
    let bytes = frame::encode(&reply, Epoch(0)).unwrap();
    let root = bytes.len() - 8;
    let offset = i32::from_le_bytes(bytes[root..root + 4].try_into().unwrap());
    let entry = (root as i64 + i64::from(offset)) as usize;
    let (name, path) = (entry, entry + 8);
    let name_ptr = i32::from_le_bytes(bytes[name + 4..name + 8].try_into().unwrap());
    let path_ptr = i32::from_le_bytes(bytes[path + 4..path + 8].try_into().unwrap());
    assert_eq!(
        bytes[(path as i64 + i64::from(path_ptr)) as usize],
        b'p',
        "layout as expected"
    );
    let mut shared = bytes;
    shared[path + 4..path + 8].copy_from_slice(&(name_ptr - 8).to_le_bytes());
    assert_eq!(
        shared[(path as i64 + i64::from(name_ptr - 8)) as usize],
        b'n'
    );
    let error = frame::decode::<ModelListReply>(&shared).unwrap_err();
    assert_eq!(
        error,
        FrameError::BadBody {
            name: "ModelListReply"
        }
    );
}

fn check_mutated<M: Message + PartialEq + std::fmt::Debug>(sample: &M, flips: &[(usize, u8)]) {
    let mut bytes = frame::encode(sample, Epoch(1)).unwrap();
    for &(at, xor) in flips {
        let at = at % bytes.len();
        bytes[at] ^= xor;
    }
    // Accepted or refused; an accepted one is a value that can be sent again.
    if let Ok((_, message)) = frame::decode::<M>(&bytes) {
        frame::encode(&message, Epoch(1)).unwrap();
    }
}

fn check_random<M: Message>(_: &M, body: &[u8]) {
    let header = Header {
        type_id: M::TYPE,
        version: M::VERSION,
        schema_hash: M::HASH,
        epoch: Epoch(0),
        body_len: u32::try_from(body.len()).unwrap(),
        tail_len: 0,
    };
    let _accepted_or_refused = frame::decode_body::<M>(&header, body);
}

fn check_cut<M: Message>(sample: &M, at: usize) {
    let bytes = frame::encode(sample, Epoch(1)).unwrap();
    assert!(frame::decode::<M>(&bytes[..at % bytes.len()]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn changed_bytes_never_panic(
        flips in prop::collection::vec((HEADER_LEN..4096usize, 1..=255u8), 1..8),
    ) {
        for_each_sample!(check_mutated, &flips);
    }

    #[test]
    fn changed_headers_never_panic(
        flips in prop::collection::vec((0..HEADER_LEN, 1..=255u8), 1..4),
    ) {
        for_each_sample!(check_mutated, &flips);
    }

    #[test]
    fn random_bodies_never_panic(body in prop::collection::vec(any::<u8>(), 0..512)) {
        for_each_sample!(check_random, &body);
    }

    #[test]
    fn random_frames_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        prop_assert!(frame::decode::<GenerateRequest>(&bytes).is_err());
        prop_assert!(frame::decode::<StatusRequest>(&bytes).is_err());
    }

    #[test]
    fn cut_frames_are_refused(at in any::<usize>()) {
        for_each_sample!(check_cut, at);
    }

    #[test]
    fn prompts_of_any_text_come_back(text in any::<String>(), ids in prop::collection::vec(any::<u32>(), 0..300)) {
        for input in [Input::Prompt(text), Input::Tokens(ids)] {
            let mut request = samples::generate_request();
            request.input = input;
            let bytes = frame::encode(&request, Epoch(0)).unwrap();
            prop_assert_eq!(frame::decode::<GenerateRequest>(&bytes).unwrap().1, request);
        }
    }
}
