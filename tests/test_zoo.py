"""attach finds the head of the models of timm, torchvision and Hugging Face, here with random weights."""

import pytest
import torch

import fastood

pytestmark = pytest.mark.slow

# Where the size of the inputs is not given it is small: a network of convolutions takes any.
TIMM = {
    "coat_lite_tiny": 224,
    "convnext_atto": None,
    "cspresnet50": None,
    "deit_tiny_patch16_224": 224,
    "densenet121": None,
    "dpn68": None,  # a 1x1 convolution is its head
    "edgenext_xx_small": None,
    "efficientnet_lite0": None,
    "ghostnet_050": None,
    "hrnet_w18_small": None,
    "inception_v3": None,
    "maxvit_tiny_tf_224": 224,
    "mixer_s32_224": 224,
    "mobilenetv3_small_050": None,
    "mobilevit_xxs": None,
    "nfnet_f0": None,
    "poolformer_s12": None,
    "pvt_v2_b0": None,
    "regnetx_002": None,
    "resmlp_12_224": 224,
    "resnet18": None,
    "resnetv2_50x1_bit": None,  # the paper's family; a 1x1 convolution is its head
    "swin_tiny_patch4_window7_224": 224,
    "vgg11": None,
    "vit_tiny_patch16_224": 224,
    "xception41": None,
}
DISTILLED = ["deit_tiny_distilled_patch16_224", "levit_128s"]
TORCHVISION = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "swin_t",
    "vgg11",
    "vit_b_32",
]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 7}
WIDE = SMALL | {"intermediate_size": 64}
TEXT = {
    "Bert": WIDE,
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "num_labels": 7},
    "Electra": WIDE | {"embedding_size": 32},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "num_labels": 7, "pad_token_id": 0},
    "Llama": WIDE | {"pad_token_id": 0},
    "Roberta": WIDE,
    "T5": {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "num_labels": 7}
    | {"decoder_start_token_id": 0},
}
IMAGE = {
    "Beit": WIDE | {"image_size": 32, "patch_size": 8},
    "ConvNext": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 7},
    "DeiT": WIDE | {"image_size": 32, "patch_size": 8},
    "Dinov2": SMALL | {"image_size": 32, "patch_size": 8},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 7},
    "Swin": {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    | {"window_size": 4, "num_labels": 7},
    "ViT": WIDE | {"image_size": 32, "patch_size": 8},
}


@pytest.fixture(scope="module")
def library():
    """Imports; torchvision's own operators, none of which these models use, may be missing beside another torch."""
    library = torch.library.Library("torchvision", "FRAGMENT")

    def load(name):
        pytest.importorskip("torchvision", reason="needs torchvision", exc_type=ModuleNotFoundError)
        return pytest.importorskip(name, reason=f"needs {name}")

    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield load
    del library


def made(create, size):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create().eval(), torch.randn(2, 3, size, size)


def check(model, x):
    attached = fastood.attach(model, example=x)
    with torch.no_grad():
        logits, feats = attached(x)
        torch.testing.assert_close(logits, model(x), rtol=0, atol=0)
    assert feats.ndim == 2
    detector = fastood.Detector("energy", norm=None).fit(10 * torch.randn(30, logits.shape[1]))
    with torch.no_grad():
        _, _, score, accept = fastood.attach(model, detector=detector, example=x)(x)
    torch.testing.assert_close(score, logits.logsumexp(1))
    assert accept.shape == (2,)
    return feats


@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize("name", TIMM)
def test_timm(library, name):
    timm = library("timm")
    model, x = made(lambda: timm.create_model(name, num_classes=7), TIMM[name] or 96)
    feats = check(model, x)
    with torch.no_grad():
        torch.testing.assert_close(feats, model.forward_head(model.forward_features(x), pre_logits=True).flatten(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DISTILLED)
def test_timm_with_two_heads(library, name):
    model, _ = made(lambda: library("timm").create_model(name, num_classes=7), 224)
    with pytest.raises(ValueError, match=r"more than one head, 'head' and 'head_dist'.*head=\(body, head\)"):
        fastood.attach(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(library, name):
    models = library("torchvision.models")
    size = 224 if name in ("swin_t", "vit_b_32") else 96
    model, x = made(lambda: getattr(models, name)(num_classes=7), size)
    check(model, x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*TEXT, *IMAGE])
def test_hugging_face(library, name):
    transformers = library("transformers")
    kind, sizes = ("Sequence", {"vocab_size": 99} | TEXT[name]) if name in TEXT else ("Image", IMAGE[name])
    config = getattr(transformers, f"{name}Config")(**sizes)
    model, images = made(lambda: getattr(transformers, f"{name}For{kind}Classification")(config), 32)
    inputs = {"pixel_values": images}
    if name in TEXT:
        tokens = torch.randint(3, 90, (2, 7))
        tokens[:, -1] = 1  # where T5 takes its features
        inputs = {"input_ids": tokens}
        if name != "T5":
            inputs["attention_mask"] = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    with torch.no_grad():
        logits, feats = fastood.attach(model, example=inputs)(**inputs)
        torch.testing.assert_close(logits, model(**inputs).logits, rtol=0, atol=0)
    assert feats.ndim == 2
