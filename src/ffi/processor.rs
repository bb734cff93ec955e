//! What the processor is.

/// Returns whether this is a processor of AMD that has AVX-512.
pub(crate) fn is_amd_with_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    return vendor() == *b"AuthenticAMD" && std::arch::is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Returns whether the processor multiplies int8 numbers and adds the products up in 32 bits (VNNI).
/// Without it, libtorch adds pairs of products up in 16 bits, which overflow without an error.
pub(crate) fn has_int8_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512vnni");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Returns the name of the processor's manufacturer.
#[cfg(target_arch = "x86_64")]
fn vendor() -> [u8; 12] {
    // SAFETY: every x86-64 processor has the instruction and its first leaf.
    #[allow(unused_unsafe, reason = "the function is safe from Rust 1.94 on")]
    let leaf = unsafe { std::arch::x86_64::__cpuid(0) };
    let mut name = [0; 12];
    for (part, register) in name.chunks_exact_mut(4).zip([leaf.ebx, leaf.edx, leaf.ecx]) {
        part.copy_from_slice(&register.to_le_bytes());
    }
    name
}

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn vendor_is_that_of_the_kernel() {
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let line = text.lines().find(|line| line.starts_with("vendor_id")).unwrap();
        assert_eq!(line.split(':').nth(1).unwrap().trim().as_bytes(), vendor());
    }
}
