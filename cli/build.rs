//! Makes the program find libtorch at run time, where the library found it at build time.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=DEP_CONVPASS_LIBTORCH_LIB");
    if let Ok(lib) = std::env::var("DEP_CONVPASS_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    }
}
