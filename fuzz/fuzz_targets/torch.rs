#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    convpass_fuzz::readers::torch(input);
});
