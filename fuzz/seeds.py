#!/usr/bin/env python3
"""Makes the seeds in fuzz/corpus from the golden files of the tests. Needs nothing but Python 3.

What a fuzzer found is committed beside them under another name; this program leaves it.
"""

import json
import pathlib
import struct
import zipfile

HERE = pathlib.Path(__file__).parent
FIXTURES = HERE.parent / "tests/integration/fixtures"


def seed(target, name, content):
    folder = HERE / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    (folder / f"seed_{name}").write_bytes(content)


def header(file):
    data = (FIXTURES / file).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def shapes(file, wanted=lambda name: True):
    """One line for each tensor, as readers.rs makes files of them."""
    tensors, _ = header(file)
    mark = {"U8": "u8 "}
    lines = [
        f"{mark.get(tensor['dtype'], '')}{name} {','.join(map(str, tensor['shape']))}"
        for name, tensor in tensors.items()
        if name != "__metadata__" and wanted(name)
    ]
    return "\n".join(lines)


def text(file):
    """A JSON file without its white space."""
    path = FIXTURES / file
    return json.dumps(json.loads(path.read_text()), separators=(",", ":")) if path.exists() else ""


def containers():
    folder = FIXTURES / "containers"
    with zipfile.ZipFile(folder / "stored.npz") as archive:
        for name in sorted(archive.namelist(), key=lambda name: archive.getinfo(name).file_size)[:4]:
            seed("npz", name.replace(".npy", "").replace("/", "_"), archive.read(name))
    seed("npz", "deflated", (folder / "deflated.npz").read_bytes())
    plain, data = header("containers/plain.safetensors")
    seed("safetensors", "whole", (folder / "plain.safetensors").read_bytes())
    seed("safetensors", "parts", json.dumps(plain).encode() + b"\0" + data)
    for name in ["top", "nested", "expanded"]:
        with zipfile.ZipFile(folder / f"{name}.pt") as archive:
            pickle = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            seed("torch", name, archive.read(pickle))
    seed("torch", "whole", (folder / "expanded.pt").read_bytes())
    seed("torch_legacy", "old", (folder / "old.pt").read_bytes())


def checkpoints():
    for name in [
        "told/timm_average", "told/hf_gelu_new", "told/open_clip_heads", "hf_hierarchical/swin_config",
        "told/timm_convnext_eps", "beit/timm_resized", "post_norm/eva_config", "swin_v2/timm_config",
        "told/timm_radio", "told/hf_dinov2_registers_resized",
    ]:
        weights = name + "/model.safetensors"
        open_clip = text(name + "/open_clip_config.json")
        if open_clip:
            weights = name + "/open_clip_model.safetensors"
        preprocessor = '{"size":{"shortest_edge":36},"crop_size":32,"resample":3}' if "hf" in name else ""
        parts = [shapes(weights), text(name + "/config.json"), preprocessor, open_clip]
        seed("checkpoint", name.replace("/", "_"), "\0".join(parts))


def adapters():
    for name in ["lora", "vpt", "low_bit", "bit_fit"]:
        file = f"adapter_0_1/{name}.safetensors"
        info = header(file)[0]["__metadata__"]["convpass"]
        seed("adapter", name, info + "\0" + shapes(file))
    seed("adapter", "whole", (FIXTURES / "adapter_0_1/vpt.safetensors").read_bytes())
    for name in ["vit_4", "vit_patterns", "vit_rank_stabilized"]:
        folder = f"peft_adapter/{name}/adapter"
        config = text(f"{folder}/adapter_config.json")
        seed("peft", name, config + "\0" + shapes(f"{folder}/adapter_model.safetensors"))


def states():
    sums = '{"images":%d,"correct":1,"loss":1.5}'
    place = '{"epoch":%d,"step":%d,"sum":' + sums + "}"
    epoch = '{"epoch":0,"lr":0.001,"loss":0.7,"accuracy":50.0,"val_top1":null,"seconds":0.1}'
    tail = '"best":null,"seconds":1.5,"epoch_seconds":0.5}'
    seed("state", "first", '{"place":%s,"epochs":[],%s' % (place % (0, 1, 2), tail))
    seed("state", "second", '{"place":%s,"epochs":[%s],%s' % (place % (1, 1, 2), epoch, tail))


def lists():
    for name, content in {
        "lines": "0images/a b.png 3\r\n\r\n../c.jpg\t 0\nd.png   1\n",
        "table": '1path,label\n"a, b.png","dog, small"\n\nc.png,cat\n',
        "semicolons": "1\ufeffClass;Image\r\ndog;a.png\r\n\r\ncat;c.png\r\n",
        "both": "1file,class,label\na.png,cat,0\nb.png,dog,1\n",
        "tabs": "2id\tfilename\tcategory\n7\ta.png\tdog\n",
        "array": '3[{"path":"a.png","label":"cat"},{"file":"b.png","class":"dog"}]',
        "object": '3{"a.png":0,"b.png":"2"}',
        "object_lines": '4{"path":"a.png","label":0}\n\n{"path":"b.png","label":2}\n',
    }.items():
        # The reader takes the byte modulo 5.
        seed("list", name, bytes([int(content[0])]) + content[1:].encode())
    utf16 = "path,label\na.png,cat\n\u00e9.png,dog\n"
    seed("list", "utf16_le", b"\x01\xff\xfe" + utf16.encode("utf-16-le"))
    seed("list", "utf16_be", b"\x01\xfe\xff" + utf16.encode("utf-16-be"))


def images():
    for name in [
        "decode/grey1.png", "decode/palette_trns1.png", "decode/grey_alpha8.png", "decode/jpeg_grey.jpg",
        "decode/jpeg_420.jpg", "decode/jpeg_cmyk.jpg", "photos/444_scans.jpg", "photos/exif_scans.jpg",
        "photos/fine_chroma_scans.jpg", "photos/bits.bmp", "photos/palette.bmp", "photos/frame_inside.gif",
        "photos/transparent.gif", "photos/frames.webp", "photos/lossless.webp", "photos/lossy.webp",
        "photos/exif.webp", "photos/bits.tif", "photos/grey.tif",
    ]:
        seed("image", pathlib.Path(name).name, (FIXTURES / name).read_bytes())


def tokenizers():
    folder = FIXTURES / "clip/tokenizer"
    whole = json.loads((folder / "tokenizer.json").read_text())
    words = whole["model"]["vocab"]
    ends = ["<|startoftext|>", "<|endoftext|>"]
    kept = [word for word in words if word in ends or len(word.removesuffix("</w>")) == 1 and word.isascii()]
    kept = kept[:20] + [word for word in ["a", "t", "a</w>", "t</w>", "at</w>", *ends] if word in words]
    number = {word: index for index, word in enumerate(dict.fromkeys(kept))}
    whole["model"]["vocab"] = number
    whole["model"]["merges"] = [
        pair for pair in whole["model"]["merges"]
        if all(word in number for word in (pair.split(" ") if isinstance(pair, str) else pair))
        and "".join(pair.split(" ") if isinstance(pair, str) else pair) in number
    ]
    for token in whole["added_tokens"]:
        token["id"] = number[token["content"]]
    for processor in ["sep", "cls"]:
        if processor in (whole["post_processor"] or {}):
            content = whole["post_processor"][processor][0]
            whole["post_processor"][processor] = [content, number[content]]
    seed("tokenizer", "small", json.dumps(whole, separators=(",", ":"), ensure_ascii=False))
    seed("tokenizer", "merges", '"#version: 0.2\na t</w>\nc at</w>\nd o\ndo g</w>\n')
    seed("tokenizer", "merges_gz", (folder / "bpe_simple_vocab.txt.gz").read_bytes())


def plans():
    seed("plan", "two_methods", """tasks = ["cifar", "own"]
seeds = [3, 4]
trials = 4
[train]
epochs = 20
lr = 2e-3
stepped = "each_step"
[[methods]]
label = "Linear probe"
method = { name = "linear_probe" }
train = { epochs = 50, normalization = "imagenet" }
grid = { lr = [1e-3, 1e-2, 1e-1, 1] }
[[methods]]
label = "Convpass, attention"
method = { name = "conv_bypass", sub_layers = "attention", bottleneck_dim = 16 }
published = true
head = "Linear probe"
grid = { scale = [0.1, 10], lr = [1e-3, 4e-3] }
""")
    seed("plan", "lora", """seeds = [0]
[[methods]]
label = "LoRA"
method = { name = "lora", rank = 8, alpha = 8.0, targets = ["q", "v"] }
train = { warmup_epochs = 1, weight_decay = 0.1, drop_path = 0.1 }
""")


for make in [containers, checkpoints, adapters, states, lists, images, tokenizers, plans]:
    make()
