//! Features of every checkpoint family against timm, transformers and open_clip.

use std::error::Error;

use crate::golden::{Case, check_all};

fn check(case: &Case) -> Result<(), Box<dyn Error>> {
    let vit = case.open(&case.file("file"))?;
    let features = vit.features(case.tensor("images"))?;
    case.compare("features", &features)?;
    if case.tensors.contains_key("image_embeds") {
        case.compare("image_embeds", &vit.project(&features)?)?;
    }
    Ok(())
}

#[test]
fn timm() {
    check_all("timm_vit", check);
}

#[test]
fn google_npz() {
    check_all("google_npz", check);
}

#[test]
fn hugging_face_vit() {
    check_all("hf_vit", check);
}

#[test]
fn hugging_face_clip() {
    check_all("clip_vision", check);
}

#[test]
fn hugging_face_dinov2() {
    check_all("dinov2_hf", check);
}

#[test]
fn open_clip() {
    check_all("open_clip", check);
}
