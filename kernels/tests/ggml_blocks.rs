//! The block formats of GGUF files against the definition that the files' own tools have: numbers are
//! those of `gguf.quants.dequantize` (gguf-py 0.19) for the same bytes.
//!
//! The digest is 64-bit FNV-1a over all 4,096 values as little-endian f32: every bit counts.
#![expect(clippy::unwrap_used, reason = "test helpers")]

use dsd_kernels::{dtype::Format, matrix::Matrix, quant};

/// Elements that are decoded.
const N: usize = 4096;

/// SplitMix64 from seed 5, the low byte of each draw. The second byte of every f16 at `halves` of a
/// block loses bit 6, so that no factor is infinite or NaN.
fn blocks(format: Format, halves: &[usize]) -> Vec<u8> {
    let mut state = 5u64;
    let mut byte = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as u8
    };
    let mut data = (0..format.row_bytes(N).unwrap())
        .map(|_| byte())
        .collect::<Vec<_>>();
    for block in data.chunks_exact_mut(format.block_bytes()) {
        halves.iter().for_each(|at| block[at + 1] &= 0xbf);
    }
    data
}

#[test]
fn values_are_those_of_the_formats_definition() {
    // Format, where a block's f16 lie, digest, elements 1, 17 and 200.
    let cases: [(Format, &[usize], u64, [f32; 3]); 8] = [
        (
            Format::Q4_0,
            &[0],
            0xf19a_9ee8_098f_114f,
            [1.6318359, 2.1757812, 13.6328125],
        ),
        (
            Format::Q4_1,
            &[0, 2],
            0x4f11_e3c1_1726_b58d,
            [-2.1757007, -2.1757007, 0.0058898926],
        ),
        (
            Format::Q5_0,
            &[0],
            0xf75f_8e96_bae6_743d,
            [-5.9833984, 7.6152344, -0.004380226],
        ),
        (
            Format::Q5_1,
            &[0, 2],
            0x1d30_e36d_0e89_ad7e,
            [-1.6317554, -3.2635913, -1.4181576],
        ),
        (
            Format::Q8_0,
            &[0],
            0xd6b4_850f_a218_9bb4,
            [-37.532227, 21.757812, -0.0011506677],
        ),
        (
            Format::Q4K,
            &[0, 2],
            0xd059_8436_88ca_6d49,
            [-29.920214, -38.07939, -22.84836],
        ),
        (
            Format::Q5K,
            &[0, 2],
            0x31c5_5359_48a4_dc3d,
            [-78.87529, -38.07939, -72.34738],
        ),
        (
            Format::Q6K,
            &[208],
            0x9984_57a3_90b4_3a1b,
            [-0.001206398, 0.0033929944, -0.0029063225],
        ),
    ];
    for (format, halves, digest, samples) in cases {
        let matrix = Matrix::new(format, 1, N, blocks(format, halves).into(), None).unwrap();
        let mut values = vec![0.0; N];
        quant::decode_row(&matrix, 0, &mut values);
        assert_eq!([1, 17, 200].map(|i| values[i]), samples, "{format}");
        let found = values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
            });
        assert_eq!(found, digest, "{format}: {found:#x}");
    }
}
