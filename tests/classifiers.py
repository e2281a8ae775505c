"""Small classifiers in the forms that torchvision, timm and Hugging Face give theirs, with what is true of them."""

from dataclasses import dataclass

import torch
from torch import nn

import fastood

C, D = 5, 8


class Conv(nn.Module):
    """Images to maps; what all models of vision here begin with."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, D, 3), nn.BatchNorm2d(D)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class ResNet(nn.Module):
    """torchvision's and timm's form, with a parameter and a buffer of the model's own."""

    def __init__(self, bias=True):
        super().__init__()
        self.body, self.fc = Conv(), nn.Linear(D, C, bias=bias)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(0.5))

    def features(self, x):
        return self.scale * self.body(x).mean((2, 3)) + self.shift

    def forward(self, x):
        return self.fc(self.features(x))


class MobileNet(nn.Module):
    """torchvision's: the last layer at the end of a Sequential, with layers before it that are part of the body."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = (
            Conv(),
            nn.Sequential(nn.Linear(D, D), nn.Hardswish(), nn.Dropout(), nn.Linear(D, C)),
        )

    def features(self, x):
        return self.classifier[:3](self.body(x).mean((2, 3)))

    def forward(self, x):
        return self.classifier(self.body(x).mean((2, 3)))


class VisionTransformer(nn.Module):
    """torchvision's: heads.head, and a view of one token of many."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = Conv(), nn.Sequential()
        self.heads.add_module("head", nn.Linear(D, C))
        self.class_token = nn.Parameter(torch.randn(D))

    def features(self, x):
        tokens = self.body(x).flatten(2).mT
        return torch.cat([tokens[:, :1] + self.class_token, tokens], 1)[:, 0]

    def forward(self, x):
        return self.heads(self.features(x))


class ClassifierHead(nn.Module):
    """timm's."""

    def __init__(self, conv):
        super().__init__()
        self.fc = nn.Conv2d(D, C, 1) if conv else nn.Linear(D, C)
        self.conv = conv

    def pooled(self, x):
        return x.mean((2, 3), keepdim=self.conv)

    def forward(self, x):
        return self.fc(self.pooled(x)).flatten(1)


class BiT(nn.Module):
    """timm's ResNetV2: a 1x1 convolution, and get_classifier. The linear layer registered last is not the head."""

    def __init__(self, conv=True):
        super().__init__()
        self.body, self.head = Conv(), ClassifierHead(conv)
        self.pretext = nn.Linear(D, 4)

    def get_classifier(self):
        return self.head.fc

    def features(self, x):
        return self.head.pooled(self.body(x)).flatten(1)

    def forward(self, x):
        return self.head(self.body(x))


class PoolLast(nn.Module):
    """A 1x1 convolution of the maps, and its mean: the head of the mean."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = Conv(), nn.Conv2d(D, C, 1)

    def features(self, x):
        return self.body(x).mean((2, 3))

    def forward(self, x):
        return self.classifier(self.body(x)).mean((2, 3), keepdim=True)


class Distilled(BiT):
    """timm's DeiT: the mean of two heads."""

    def __init__(self):
        super().__init__(conv=False)
        self.head, self.head_dist = nn.Linear(D, C), nn.Linear(D, C)

    def get_classifier(self):
        return self.head, self.head_dist

    def features(self, x):
        return self.body(x).mean((2, 3))

    def forward(self, x):
        f = self.features(x)
        return (self.head(f) + self.head_dist(f)) / 2


@dataclass
class Output:
    """Hugging Face's ModelOutput."""

    logits: torch.Tensor
    hidden_states: None = None


class Bert(nn.Module):
    """Hugging Face's: arguments by name, an object with .logits. RoBERTa's head is the last layer of a module."""

    def __init__(self, deep=False):
        super().__init__()
        self.embeddings, self.dropout = nn.Embedding(20, D), nn.Dropout()
        self.classifier = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, C)) if deep else nn.Linear(D, C)

    def features(self, input_ids, attention_mask):
        h = self.dropout((self.embeddings(input_ids) * attention_mask[..., None]).mean(1))
        return self.classifier[:2](h) if isinstance(self.classifier, nn.Sequential) else h

    def forward(self, input_ids, attention_mask):
        h = self.dropout((self.embeddings(input_ids) * attention_mask[..., None]).mean(1))
        return Output(logits=self.classifier(h))


class Llama(nn.Module):
    """Hugging Face's: the head is applied to every token, then the last token's row is taken."""

    def __init__(self):
        super().__init__()
        self.embed, self.score = nn.Embedding(20, D), nn.Linear(D, C, bias=False)

    def features(self, input_ids, attention_mask):
        return self.embed(input_ids)[torch.arange(len(input_ids)), attention_mask.sum(1) - 1]

    def forward(self, input_ids, attention_mask):
        logits = self.score(self.embed(input_ids))
        return Output(logits=logits[torch.arange(len(input_ids)), attention_mask.sum(1) - 1])


IMAGES = [ResNet, MobileNet, VisionTransformer, BiT, lambda: BiT(conv=False), PoolLast]
TEXTS = [Bert, lambda: Bert(deep=True), Llama]


def images(n=6):
    return torch.randn(n, 3, 6, 6)


def texts(n=6):
    mask = (torch.arange(7) < torch.randint(1, 8, (n, 1))).long()
    return {"input_ids": torch.randint(20, (n, 7)), "attention_mask": mask}


def made(form, n=6):
    """A model that has seen data, and inputs."""
    model, inputs = form(), texts(n) if form in TEXTS else images(n)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval(), inputs


def call(model, inputs):
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def truth(model, inputs):
    """Logits and feats as the model itself has them."""
    logits = call(model, inputs)
    with torch.no_grad():
        feats = model.features(**inputs) if isinstance(inputs, dict) else model.features(inputs)
    return (logits if isinstance(logits, torch.Tensor) else logits.logits).reshape(-1, C), feats


def fitted(model, inputs, **options):
    logits, feats = truth(model, inputs)
    return fastood.Detector(tpr=0.6, **options).fit(logits, feats)


OPTIONS = [
    {"method": "energy", "norm": 0.3},
    {"method": "msp", "norm": None, "per_class": True},
    {"method": "norm", "norm": 2, "per_class": True},
]
