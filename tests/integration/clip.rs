//! Zero-shot classification against transformers: token ids, features, logits; and heads made of class names.

use std::path::{Path, PathBuf};

use convpass::backbone::{ClipText, ClipTextConfig, MlpActivation};
use convpass::checkpoint::TensorFile;
use convpass::clip::{ClipTokenizer, Templates, ZeroShot};
use convpass::{
    Backbone, ConvBypassConfig, Error, FrozenViT, Method, PetlConfig, PetlModel, ViTConfig,
};
use serde::Deserialize;
use tch::{Kind, Tensor};

use crate::golden::{Case, cases, fixtures};
use crate::support::{Close, device};

const NAMINGS: [&str; 3] = ["hugging_face", "openai", "open_clip"];

fn vocabulary(file: &str) -> PathBuf {
    fixtures().join("clip/tokenizer").join(file)
}

fn tokenizer() -> ClipTokenizer {
    ClipTokenizer::open(vocabulary("tokenizer.json")).unwrap()
}

fn model() -> (Case, PathBuf) {
    (cases("clip").remove(0), fixtures().join("clip/model"))
}

fn text_config(path: &Path) -> ClipTextConfig {
    let config = ClipTextConfig::infer(path).unwrap();
    ClipTextConfig { num_heads: 2, activation: MlpActivation::QuickGelu, ..config }
}

fn open(path: &Path) -> (FrozenViT, ClipText) {
    let vit = ViTConfig {
        num_heads: 2,
        activation: MlpActivation::QuickGelu,
        ..ViTConfig::infer(path).unwrap()
    };
    let vit = FrozenViT::open_with(path, &vit, device()).unwrap();
    (vit, ClipText::open_with(path, &text_config(path), device()).unwrap())
}

/// The same class names and templates as in the golden file.
fn zero_shot(case: &Case, text: &ClipText, templates: usize) -> ZeroShot {
    let mut sentences: Vec<String> = case.fact("templates");
    sentences.truncate(templates);
    let templates = Templates::new(sentences).unwrap();
    let classes: Vec<String> = case.fact("classes");
    ZeroShot::encode(text, &tokenizer(), &classes, &templates).unwrap()
}

#[derive(Deserialize)]
struct Text {
    about: String,
    text: String,
    ids: Vec<i64>,
    cut: Vec<i64>,
}

#[test]
fn token_ids_are_those_of_hugging_face() {
    let texts = std::fs::read(vocabulary("texts.json")).unwrap();
    let texts: Vec<Text> = serde_json::from_slice(&texts).unwrap();
    assert!(texts.len() > 60);
    let packed = std::fs::read(vocabulary("bpe_simple_vocab.txt.gz")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("bpe.txt");
    let mut unpacked = flate2::read::GzDecoder::new(&packed[..]);
    std::io::copy(&mut unpacked, &mut std::fs::File::create(&plain).unwrap()).unwrap();
    for path in [
        vocabulary("tokenizer.json"),
        vocabulary(""),
        vocabulary("pair"),
        vocabulary("pair/vocab.json"),
        vocabulary("pair/merges.txt"),
        vocabulary("bpe_simple_vocab.txt.gz"),
        plain,
    ] {
        let tokenizer = ClipTokenizer::open(&path).unwrap();
        assert_eq!(tokenizer.vocab_size(), tokenizer.end() + 1);
        for Text { about, text, ids, cut } in &texts {
            assert_eq!(&tokenizer.encode(text).unwrap(), ids, "{about} by {}", path.display());
            let length = cut.len() as i64;
            let batch = tokenizer.batch(&[text, text], length).unwrap();
            assert_eq!(batch.size(), [2, length]);
            assert_eq!(&Vec::<i64>::try_from(batch.get(1)).unwrap(), cut, "{about}");
        }
    }
}

#[test]
fn logits_are_those_of_transformers_under_each_naming() {
    let (case, folder) = model();
    for naming in NAMINGS {
        let (vit, text) = open(&folder.join(format!("{naming}.safetensors")));
        let embeds = vit.project(&vit.features(case.tensor("images")).unwrap()).unwrap();
        let ids = case.tensor("ids").to_kind(Kind::Int64);
        let check = |name, found: &Tensor| {
            case.compare(name, found).unwrap_or_else(|e| panic!("{naming}: {e}"));
        };
        check("image_embeds", &embeds);
        check("text_embeds", &text.features(&ids).unwrap());
        check("logits", &zero_shot(&case, &text, 1).logits(&embeds).unwrap());
        check("ensemble", &zero_shot(&case, &text, 3).logits(&embeds).unwrap());
        let by_ids = ZeroShot::from_ids(&text, &ids.unsqueeze(1)).unwrap();
        check("logits", &by_ids.logits(&embeds).unwrap());
    }
}

#[test]
fn gelu_and_an_end_token_within_a_text() {
    let (case, folder) = model();
    let path = folder.join("hugging_face.safetensors");
    let gelu = MlpActivation::Gelu;
    let vit = ViTConfig { num_heads: 2, activation: gelu, ..ViTConfig::infer(&path).unwrap() };
    let vit = FrozenViT::open_with(&path, &vit, device()).unwrap();
    let config = ClipTextConfig { activation: gelu, ..text_config(&path) };
    let text = ClipText::open_with(&path, &config, device()).unwrap();
    let embeds = vit.project(&vit.features(case.tensor("images")).unwrap()).unwrap();
    case.compare("gelu", &zero_shot(&case, &text, 1).logits(&embeds).unwrap()).unwrap();

    let end = ClipTextConfig { end_token: Some(case.fact("end_token")), ..text_config(&path) };
    let text = ClipText::open_with(&path, &end, device()).unwrap();
    let ids = case.tensor("split_ids").to_kind(Kind::Int64);
    case.compare("split_text_embeds", &text.features(&ids).unwrap()).unwrap();
}

/// What follows the end of each text, and texts beside it, change nothing but the rounding.
#[test]
fn what_follows_the_end_is_not_read() {
    let (case, folder) = model();
    let (_, text) = open(&folder.join("openai.safetensors"));
    let ids = case.tensor("ids").to_kind(Kind::Int64);
    let whole = text.features(&ids).unwrap();
    let end = text.config().vocab_size - 1;
    for row in 0..ids.size()[0] {
        let own = Vec::<i64>::try_from(ids.get(row)).unwrap();
        let length = 1 + own.iter().position(|&id| id == end).unwrap();
        let alone = text.features(&Tensor::from_slice(&own[..length]).unsqueeze(0)).unwrap();
        assert!(alone.is_close(&whole.narrow(0, row, 1), 1e-5, 1e-6), "{row}");
        let padded: Vec<i64> =
            own[..length].iter().copied().chain(vec![0; own.len() - length]).collect();
        let padded = text.features(&Tensor::from_slice(&padded).unsqueeze(0)).unwrap();
        assert_eq!(alone, padded);
    }
}

/// Both towers account for each tensor of a file, those of the other tower by a reason.
#[test]
fn a_file_of_both_towers_is_accounted_for() {
    for naming in NAMINGS {
        let path = model().1.join(format!("{naming}.safetensors"));
        let count = TensorFile::open(&path).unwrap().names().count();
        let vit = ViTConfig { num_heads: 2, ..ViTConfig::infer(&path).unwrap() };
        let (_, image) = FrozenViT::open_reported(&path, Some(&vit), device()).unwrap();
        let (_, text) =
            ClipText::open_reported(&path, Some(&text_config(&path)), device()).unwrap();
        for report in [&image, &text] {
            assert_eq!(report.applied.len() + report.skipped.len(), count, "{naming}: {report}");
        }
        assert!(image.skipped.iter().all(|(name, _)| !name.contains("vis")), "{image}");
        let skipped = |reason: &str| text.skipped.iter().filter(|(_, why)| why == reason).count();
        let numbers = if naming == "openai" { 3 } else { 0 };
        assert_eq!(skipped("numbers about the model, not weights"), numbers);
        assert_eq!(skipped("the image tower"), text.skipped.len() - numbers, "{text}");
        assert!(text.applied.contains(&"logit_scale".to_owned()));
        let config = text_config(&path);
        assert_eq!((config.depth, config.context_length, config.projection), (2, 16, Some(12)));
    }
}

/// A text tower alone, as `CLIPTextModelWithProjection` and transformers 5's `CLIPTextModel` write it.
#[test]
fn a_text_tower_alone() {
    let (case, folder) = model();
    let file = TensorFile::open(folder.join("hugging_face.safetensors")).unwrap();
    let tower = tempfile::tempdir().unwrap();
    let path = tower.path().join("text.safetensors");
    let ids = case.tensor("ids").to_kind(Kind::Int64);
    for (projection, strip) in [(true, false), (false, true)] {
        let tensors = file.names().filter(|n| {
            n.starts_with("text_model.") || (projection && *n == "text_projection.weight")
        });
        let named =
            |name: &str| if strip { name.replace("text_model.", "") } else { name.to_owned() };
        let tensors: Vec<_> = tensors.map(|n| (named(n), file.tensor(n).unwrap())).collect();
        Tensor::write_safetensors(&tensors, &path).unwrap();
        let text = ClipText::open_with(&path, &text_config(&path), device()).unwrap();
        assert_eq!((text.logit_scale(), text.config().logit_scale), (None, false));
        let features = text.features(&ids).unwrap();
        assert_eq!(features.size(), [ids.size()[0], text.config().feature_dim()]);
        if projection {
            case.compare("text_embeds", &features).unwrap();
        }
        let error = FrozenViT::open(&path, device()).unwrap_err();
        assert!(matches!(error, Error::OtherBackbone { found: "CLIP text tower", .. }), "{error}");
    }
    let image = cases("clip_vision").pop().unwrap();
    let error = ClipText::open(image.file("file"), device()).unwrap_err();
    assert!(matches!(error, Error::OtherBackbone { found: "ViT", .. }), "{error}");
    let neither = fixtures().join("containers/plain.safetensors");
    assert!(matches!(ClipText::open(neither, device()), Err(Error::UnknownFormat { .. })));
}

#[test]
fn ids_that_do_not_fit_are_refused() {
    let (_, folder) = model();
    let (_, text) = open(&folder.join("hugging_face.safetensors"));
    let vocab = text.config().vocab_size;
    for ids in [
        Tensor::from_slice(&[0i64, vocab]).unsqueeze(0),
        Tensor::from_slice(&[-1i64, 3]).unsqueeze(0),
        Tensor::from_slice(&[0i64, 3]),
        Tensor::from_slice(&[0i32, 3]).unsqueeze(0),
        Tensor::zeros([1, 17], (Kind::Int64, device())),
        Tensor::zeros([1, 0], (Kind::Int64, device())),
        Tensor::zeros([0, 4], (Kind::Int64, device())),
        Tensor::new(),
    ] {
        assert!(matches!(text.features(&ids), Err(Error::Input { argument: "ids", .. })));
    }
    let config = ClipTextConfig { end_token: Some(3), ..text.config().clone() };
    let text = ClipText::random(&config, 0, device()).unwrap();
    let without = Tensor::from_slice(&[1i64, 3, 1, 1]).to_device(device()).view([2, 2]);
    assert!(matches!(text.features(&without), Err(Error::Input { argument: "ids", .. })));
    for wrong in [
        ClipTextConfig { end_token: Some(vocab), ..config.clone() },
        ClipTextConfig { num_heads: 3, ..config.clone() },
        ClipTextConfig { depth: 0, ..config.clone() },
        ClipTextConfig { norm_eps: f64::NAN, ..config },
    ] {
        assert!(matches!(ClipText::random(&wrong, 0, device()), Err(Error::Config { .. })));
    }
}

#[test]
fn another_models_tokenizer_is_refused() {
    let (_, folder) = model();
    let (_, own) = open(&folder.join("hugging_face.safetensors"));
    let (tokenizer, templates) = (tokenizer(), Templates::default());
    let end = tokenizer.end();
    for (vocab_size, end_token) in [(end, None), (end + 2, None), (end + 1, Some(end - 1))] {
        let config = ClipTextConfig { vocab_size, end_token, ..own.config().clone() };
        let text = ClipText::random(&config, 0, device()).unwrap();
        let error = ZeroShot::encode(&text, &tokenizer, &["cat"], &templates).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{error}");
    }
    let none: [&str; 0] = [];
    assert!(matches!(
        ZeroShot::encode(&own, &tokenizer, &none, &templates),
        Err(Error::Config { .. })
    ));
}

/// Cut at every length, and with a byte changed: opened or refused.
#[test]
fn spoilt_vocabularies_are_read_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "bpe_simple_vocab.txt.gz", "pair/vocab.json", "pair/merges.txt"]
    {
        let bytes = std::fs::read(vocabulary(name)).unwrap();
        let path = folder.path().join(Path::new(name).file_name().unwrap());
        if name == "pair/vocab.json" {
            std::fs::copy(vocabulary("pair/merges.txt"), folder.path().join("merges.txt")).unwrap();
        }
        let step = (bytes.len() / 150).max(1);
        for length in (0..bytes.len() - 1).step_by(step) {
            std::fs::write(&path, &bytes[..length]).unwrap();
            let opened = ClipTokenizer::open(&path);
            assert!(opened.is_err() || name.ends_with("merges.txt"), "{name} cut at {length}");
            let mut changed = bytes.clone();
            changed[length] ^= 0x15;
            std::fs::write(&path, &changed).unwrap();
            if let Ok(tokenizer) = ClipTokenizer::open(&path) {
                let _encoded_or_refused = tokenizer.encode("a photo of the caf\u{e9}'s cat");
            }
        }
    }
    std::fs::write(folder.path().join("vocab.json"), r#"{"a": 0}"#).unwrap();
    let error = ClipTokenizer::open(folder.path().join("vocab.json")).unwrap_err();
    assert!(matches!(error, Error::FileField { .. }), "{error}");
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(ClipTokenizer::open(empty.path()), Err(Error::UnknownFormat { .. })));
    assert!(matches!(ClipTokenizer::open("/no/such/file"), Err(Error::Io { .. })));
}

/// With the head made of class names, an adapted model starts as the zero-shot classifier.
#[test]
fn a_head_of_class_names_starts_as_the_zero_shot_classifier() {
    let (case, folder) = model();
    let (vit, text) = open(&folder.join("open_clip.safetensors"));
    let zero_shot = zero_shot(&case, &text, 3);
    let pixels = Tensor::arange(64 * 3 * 16 * 16, (Kind::Double, device()));
    let images = (((pixels * 12.9898).sin() * 43.758).sin() * 2).to_kind(Kind::Float);
    let images = images.view([64, 3, 16, 16]);
    let embeds = vit.project(&vit.features(&images).unwrap()).unwrap();
    let expected = zero_shot.logits(&embeds).unwrap();
    let classes = zero_shot.weight().size()[0];

    let bypass = Method::ConvBypass(ConvBypassConfig::default());
    let mut model = PetlModel::new(vit.clone(), &PetlConfig::new(bypass, classes)).unwrap();
    // Whatever numbers the projection is in.
    let agree = |exact: &Tensor, other: FrozenViT| {
        let other = zero_shot.head(&other, &images).unwrap();
        let gap = (&other - exact).abs().max() / exact.abs().max();
        assert!(gap.double_value(&[]) < 0.02, "{gap:?}");
    };
    let head = zero_shot.head(&vit, &images).unwrap();
    agree(&head, vit.to_int8().unwrap());
    agree(&head, vit.to_kind(Kind::Half).unwrap());
    model.set_head(&head, None).unwrap();
    let logits = model.forward(&images, false).unwrap();
    let found = logits.argmax(-1, false);
    assert_eq!(found, expected.argmax(-1, false));
    // Only the length of an embedding stands between the two.
    let lengths = embeds.norm_scalaropt_dim(2, [1], true);
    let scaled = &expected * &lengths / lengths.mean(Kind::Float);
    assert!(logits.is_close(&scaled, 1e-4, 1e-4));

    let path = tempfile::tempdir().unwrap();
    let path = path.path().join("head.safetensors");
    model.save_adapter(&path).unwrap();
    let loaded: PetlModel = PetlModel::load_adapter(vit.clone(), &path).unwrap();
    assert_eq!(loaded.forward(&images, false).unwrap(), logits);

    let narrower = ClipTextConfig { projection: Some(8), ..text.config().clone() };
    let other = ClipText::random(&narrower, 0, device()).unwrap();
    let other =
        ZeroShot::from_ids(&other, &case.tensor("ids").to_kind(Kind::Int64).unsqueeze(1)).unwrap();
    assert!(matches!(other.head(&vit, &images), Err(Error::Config { .. })));
    assert!(matches!(other.logits(&embeds), Err(Error::Input { .. })));
}

#[test]
fn a_head_of_another_shape_is_refused() {
    let config = ViTConfig {
        image_size: (16, 16),
        patch_size: 4,
        embed_dim: 8,
        depth: 1,
        num_heads: 1,
        mlp_dim: 8,
        ..ViTConfig::default()
    };
    let vit = FrozenViT::random(&config, 0, device()).unwrap();
    let mut model = PetlModel::new(vit, &PetlConfig::new(Method::LinearProbe, 3)).unwrap();
    let before = model.var_store().variables()["head.weight"].copy();
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, device()));
    let (weight, bias) = (zeros(&[3, 8]), zeros(&[3]));
    for (weight, bias) in [
        (zeros(&[8, 3]), None),
        (zeros(&[3, 9]), None),
        (weight.to_kind(Kind::Int64), None),
        (Tensor::new(), None),
        (weight.shallow_clone(), Some(zeros(&[4]))),
        (weight.shallow_clone(), Some(zeros(&[3, 1]))),
    ] {
        let error = model.set_head(&weight, bias.as_ref()).unwrap_err();
        assert!(matches!(error, Error::Input { .. }), "{error}");
    }
    assert_eq!(model.var_store().variables()["head.weight"], before);
    model.set_head(&weight.to_kind(Kind::Half), Some(&(bias + 2.0))).unwrap();
    let images = zeros(&[1, 3, 16, 16]);
    assert_eq!(model.forward(&images, false).unwrap(), zeros(&[1, 3]) + 2.0);
    model.set_head(&weight, None).unwrap();
    assert_eq!(model.forward(&images, false).unwrap(), zeros(&[1, 3]));
}

/// The crate `tokenizers` panics on merges whose second part is shorter than the prefix of subwords.
#[test]
fn a_vocabulary_that_makes_the_tokenizer_panic_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    let text = r#"{"version": "1.0", "model": {"type": "BPE", "continuing_subword_prefix": "long",
        "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}"#;
    std::fs::write(&file, text).unwrap();
    let error = ClipTokenizer::open(&file).unwrap_err();
    assert!(
        matches!(&error, Error::CorruptFile { reason, .. } if reason.contains("fail")),
        "{error}"
    );
}

#[test]
fn the_rows_of_a_head_follow_the_names_of_the_classes() {
    let config = ViTConfig {
        image_size: (16, 16),
        patch_size: 4,
        embed_dim: 8,
        depth: 1,
        num_heads: 1,
        mlp_dim: 8,
        ..ViTConfig::default()
    };
    let vit = FrozenViT::random(&config, 0, device()).unwrap();
    let model = |names: &[&str]| {
        let config = PetlConfig::new(Method::LinearProbe, 3);
        let mut model = PetlModel::new(vit.clone(), &config).unwrap();
        if !names.is_empty() {
            model.set_class_names(names.iter().map(|&name| name.to_owned()).collect()).unwrap();
        }
        model
    };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("head.safetensors");
    let mut trained = model(&["cat", "dog", "ant"]);
    let bias = Tensor::from_slice(&[1f32, 2.0, 3.0]).to_device(device());
    let weight = Tensor::arange(24, (Kind::Float, device())).view([3, 8]);
    trained.set_head(&weight, Some(&bias)).unwrap();
    trained.save_adapter(&file).unwrap();
    let loaded = |names: &[&str]| {
        let mut model = model(names);
        model.load_head(&file)?;
        let bias = model.var_store().variables()["head.bias"].copy();
        let first = model.var_store().variables()["head.weight"].select(1, 0);
        Ok([Vec::<f32>::try_from(bias).unwrap(), Vec::try_from(first).unwrap()])
    };
    assert_eq!(loaded(&["ant", "cat", "dog"]).unwrap(), [[3.0, 1.0, 2.0], [16.0, 0.0, 8.0]]);
    for names in [&[][..], &["0", "1", "2"], &["cat", "dog", "ant"]] {
        assert_eq!(loaded(names).unwrap()[0], [1.0, 2.0, 3.0], "{names:?}");
    }
    let refused: convpass::Result<_> = loaded(&["ant", "bee", "cat"]);
    let Err(Error::ClassMismatch { missing, unexpected, .. }) = refused else { panic!() };
    assert_eq!((missing, unexpected), (vec!["bee".to_owned()], vec!["dog".to_owned()]));
}
