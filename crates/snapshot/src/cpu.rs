//! Whether a CPU can run a guest that was snapshotted on another: vendor, and each feature that
//! the guest was shown (Intel SDM vol. 2 CPUID, AMD APM vol. 3 appendix E).

use crate::state::CpuidEntry;

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

/// A feature word: leaf, index, register, the bits that are features of the hardware (others
/// follow the guest's own settings or are KVM's to give), and the names of those that users know.
struct Word {
    function: u32,
    index: u32,
    register: Register,
    mask: u32,
    names: &'static [(u32, &'static str)],
}

const fn word(
    function: u32,
    index: u32,
    register: Register,
    mask: u32,
    names: &'static [(u32, &'static str)],
) -> Word {
    Word {
        function,
        index,
        register,
        mask,
        names,
    }
}

/// Not compared in leaf 1 ECX: x2apic (21), tsc-deadline (24), osxsave (27), hypervisor (31).
const LEAF_1_ECX: u32 = !((1 << 21) | (1 << 24) | (1 << 27) | (1 << 31));
/// Not compared in leaf 1 EDX: htt (28), which follows the number of vCPUs.
const LEAF_1_EDX: u32 = !(1 << 28);
/// Not compared in leaf 7 ECX: ospke (4).
const LEAF_7_ECX: u32 = !(1 << 4);

/// Not compared in leaf 0x80000001 ECX: cmp_legacy (1) and topoext (22), which tell how the host's
/// cores lie together.
const LEAF_EXT_1_ECX: u32 = !((1 << 1) | (1 << 22));

static WORDS: [Word; 12] = [
    word(
        1,
        0,
        Ecx,
        LEAF_1_ECX,
        &[
            (0, "sse3"),
            (1, "pclmulqdq"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (17, "pcid"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    ),
    word(
        1,
        0,
        Edx,
        LEAF_1_EDX,
        &[
            (4, "tsc"),
            (8, "cx8"),
            (15, "cmov"),
            (23, "mmx"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
        ],
    ),
    word(
        7,
        0,
        Ebx,
        !0,
        &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    word(
        7,
        0,
        Ecx,
        LEAF_7_ECX,
        &[
            (1, "avx512vbmi"),
            (2, "umip"),
            (3, "pku"),
            (6, "avx512_vbmi2"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (14, "avx512_vpopcntdq"),
            (16, "la57"),
            (22, "rdpid"),
        ],
    ),
    word(
        7,
        0,
        Edx,
        !0,
        &[
            (4, "fsrm"),
            (8, "avx512_vp2intersect"),
            (14, "serialize"),
            (22, "amx_bf16"),
            (23, "avx512_fp16"),
            (24, "amx_tile"),
            (25, "amx_int8"),
            (26, "ibrs"),
            (31, "ssbd"),
        ],
    ),
    word(7, 1, Eax, !0, &[(4, "avx_vnni"), (5, "avx512_bf16")]),
    word(
        0xd,
        0,
        Eax,
        !0,
        &[
            (0, "x87 state"),
            (1, "sse state"),
            (2, "avx state"),
            (5, "avx512 opmask state"),
            (6, "avx512 zmm_hi256 state"),
            (7, "avx512 hi16_zmm state"),
            (9, "pkru state"),
            (17, "amx tile configuration state"),
            (18, "amx tile data state"),
        ],
    ),
    word(
        0xd,
        1,
        Eax,
        !0,
        &[
            (0, "xsaveopt"),
            (1, "xsavec"),
            (2, "xgetbv1"),
            (3, "xsaves"),
        ],
    ),
    word(
        0x8000_0001,
        0,
        Ecx,
        LEAF_EXT_1_ECX,
        &[
            (0, "lahf_lm"),
            (5, "abm"),
            (6, "sse4a"),
            (8, "3dnowprefetch"),
            (11, "xop"),
            (16, "fma4"),
        ],
    ),
    word(
        0x8000_0001,
        0,
        Edx,
        !0,
        &[
            (11, "syscall"),
            (20, "nx"),
            (26, "pdpe1gb"),
            (27, "rdtscp"),
            (29, "lm"),
        ],
    ),
    word(0x8000_0007, 0, Edx, 1 << 8, &[(8, "constant_tsc")]),
    word(
        0x8000_0008,
        0,
        Ebx,
        !0,
        &[(0, "clzero"), (12, "ibpb"), (14, "ibrs"), (15, "stibp")],
    ),
];

fn value(entries: &[CpuidEntry], word: &Word) -> u32 {
    let entry = entries
        .iter()
        .find(|entry| (entry.function, entry.index) == (word.function, word.index));
    entry.map_or(0, |entry| match word.register {
        Eax => entry.eax,
        Ebx => entry.ebx,
        Ecx => entry.ecx,
        Edx => entry.edx,
    })
}

/// The CPU's vendor as CPUID leaf 0 spells it.
pub fn vendor(entries: &[CpuidEntry]) -> String {
    let Some(leaf) = entries.iter().find(|entry| entry.function == 0) else {
        return String::new();
    };
    let letters = [leaf.ebx, leaf.edx, leaf.ecx]
        .map(u32::to_le_bytes)
        .concat();
    String::from_utf8_lossy(&letters).into_owned()
}

/// Names of the features that the guest was shown and the host does not have.
pub fn missing(guest: &[CpuidEntry], host: &[CpuidEntry]) -> Vec<String> {
    let mut names = Vec::new();
    for word in &WORDS {
        let lacking = value(guest, word) & !value(host, word) & word.mask;
        for bit in (0..32).filter(|bit| lacking & (1 << bit) != 0) {
            let known = word.names.iter().find(|(number, _)| *number == bit);
            names.push(match known {
                Some((_, name)) => (*name).to_owned(),
                None => format!(
                    "CPUID {:#x}.{}:{:?}[{bit}]",
                    word.function, word.index, word.register
                ),
            });
        }
    }
    names
}

/// Why this host cannot run the guest, as a sentence; `None` if it can.
pub fn refusal(guest: &[CpuidEntry], host: &[CpuidEntry]) -> Option<String> {
    let (theirs, ours) = (vendor(guest), vendor(host));
    if theirs != ours {
        return Some(format!(
            "it was taken on a CPU by {theirs}, and this one is by {ours}"
        ));
    }
    let missing = missing(guest, host);
    (!missing.is_empty()).then(|| {
        format!(
            "it was taken on a CPU with features that this one lacks: {}",
            missing.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, registers: [u32; 4]) -> CpuidEntry {
        let [eax, ebx, ecx, edx] = registers;
        CpuidEntry {
            function,
            index: 0,
            flags: 0,
            eax,
            ebx,
            ecx,
            edx,
        }
    }

    fn vendor_leaf(name: &[u8; 12]) -> CpuidEntry {
        let part =
            |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
        leaf(0, [7, part(0), part(8), part(4)])
    }

    #[test]
    fn a_missing_feature_is_refused_by_its_name() {
        let amd = vendor_leaf(b"AuthenticAMD");
        let guest = [amd, leaf(7, [0, (1 << 5) | (1 << 16), 0, 0])];
        let host = [amd, leaf(7, [0, 1 << 5, 0, 0])];
        assert!(refusal(&guest, &host).unwrap().contains("avx512f"));
        assert_eq!(refusal(&host, &guest), None);
        assert_eq!(refusal(&guest, &guest), None);
    }

    #[test]
    fn another_vendor_is_refused_by_name() {
        let sentence = refusal(
            &[vendor_leaf(b"GenuineIntel")],
            &[vendor_leaf(b"AuthenticAMD")],
        );
        assert!(sentence.unwrap().contains("GenuineIntel"));
    }

    #[test]
    fn a_feature_without_a_name_is_told_by_its_place() {
        let guest = [leaf(7, [0, 1 << 15, 0, 0])];
        assert_eq!(missing(&guest, &[]), ["CPUID 0x7.0:Ebx[15]"]);
    }

    #[test]
    fn what_follows_the_guests_own_settings_is_not_compared() {
        let guest = [leaf(1, [0, 0, 1 << 27, 0])];
        assert!(missing(&guest, &[leaf(1, [0; 4])]).is_empty());
    }
}
