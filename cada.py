r"""CADA: one detector, one threshold, no class labels (arXiv:2404.00724), on RevDist (2201.10703).

Guo, Han, Lu, Zhang, Li. Absolute-Unified Multi-Class Anomaly Detection via Class-Agnostic
Distribution Alignment, 2024. A reconstruction from public facts; every choice says where it comes
from: [paper] stated there, [author] in public code of its first author, [ours] Dn a reading of
ours, the n-th in the README's list of departures.

The idea. A detector trained on many classes scores each class on a level of its own: a normal
granite slab scores higher than a torn wire grid. So no single threshold can serve, and to rank all
images together is hopeless. CADA looks at the image, predicts which mean u and which maximum gamma
the anomaly maps of *normal* images of its kind have, and rescales the map by them. No class label
is used in training or at test. The detector is not changed, so nearly any will do.

    image (B, 3, S, S)
      |
    Teacher, frozen ResNet ---> e1, e2, e3 ---> Student: fuse, bottleneck, decode ---> d1, d2, d3
                                    |                                                      |
                  mean and std over all positions              1 - cos(e, d) at each position,
                                    |                          up-sampled, averaged over layers
                        pooled (B, 2(C1+C2+C3))                                            |
                                    |                                   raw map A (B, S, S)
                                  CADA ---> u (B,), gamma (B,)                             |
                                                     \_____ A' = (A - u) / (gamma - u) ____/
                                                                        |
                                    Gaussian blur, mean of the highest 1 % ---> image score (B,)

Sections between `shared` banners stand in both scripts letter for letter; data, map and metrics
apart, they are plumbing that a first reading can skip.

paper                                        here
  RevDist, the base detector [paper]           Teacher, Student, RevDist
  cosine loss per flattened layer [author]     RevDist.forward
  anomaly map A [author]                       RevDist.describe
  prediction of (u, gamma) [paper]             CADA.fit, CADA.predict; [ours] D5
  alignment A' [author]                        normalise
  Fig. 4(a): label known (oracle)              class_statistics [ours] D7
  score distributions by class                 plot_distributions
  absolute-unified evaluation [paper]          "pooled" in summarise

    python cada.py                                     train and evaluate; without data/mvtec and
                                                       data/visa on the small set in data/demo
    python cada.py --data DIR                          on MVTec AD, VisA, or a tree of your own
    python cada.py eval --checkpoint FILE              the same numbers again
    python cada.py predict --checkpoint FILE PATH ...  score images, write heat maps
    python cada.py --base cnc [--checkpoint FILE]      on top of CNC (cnc.py), trained or to train
    torchrun --nproc-per-node=N cada.py ...            the same on N GPUs

Measured on the demo set: random ResNet-18, 2 CPU cores, about 2 minutes a run, seeds 0-2, I-AUROC
in %: pooled raw 66.5 +- 1.3, CADA 80.1 +- 2.5, label oracle 80.1 +- 2.5; class mean 81.3 +- 2.1 for
all three; on CNC, pooled raw 88.5 +- 1.5, CADA and oracle 89.8 +- 1.6. MVTec AD, VisA and a GPU:
not run here. ELPV, where it does harm with a random CLIP, and all that was tried: data/RESULTS.md.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import (AbstractContextManager, contextmanager, nullcontext, redirect_stderr,
                        redirect_stdout, suppress)
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from filelock import FileLock, Timeout
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy import ndimage
from sklearn.cluster import KMeans
from sklearn.metrics import (average_precision_score, pairwise_distances, precision_recall_curve,
                             roc_auc_score, silhouette_score)
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.utils.data import DataLoader, Dataset
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


# ==== shared: options
def option(default: object, help: str, choices: tuple | None = None) -> object:
    """A field of Config that is also a command-line flag; its help text is its documentation."""
    return field(default=default, metadata={"help": help, "choices": choices})
# ==== end shared


# ---- settings ------------------------------------------------------------------------------------
@dataclass
class Config:
    """Every flag. The defaults are for MVTec AD and VisA: RevDist as CADA's first author trains it
    in public code, written for a sibling model [author]."""

    data: str = option(None, "data set folder; default: data/mvtec, else data/visa, else data/demo")
    out: str = option("runs/cada", "folder for everything that is written")
    seed: int = option(0, "seed of weights, batches and CADA's training")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    teacher: str = option("wide_resnet50_2", "frozen torchvision ResNet; the default is RD's")
    weights: str = option("IMAGENET1K_V1", "its weights: torchvision tag, local file, or none "
                          "(random)")
    image_size: int = option(256, "sides of the square that images are squashed to, in pixels; "
                             "256 is RD's")
    batch_size: int = option(16, "images a training step [author]")
    iters: int = option(5000, "training steps of the detector [author]")
    lr: float = option(2e-3, "AdamW learning rate, x 0.2 at 80 %% of iters [author]")
    loss: str = option("flat", "cosine of a whole flattened layer [author] or by position "
                       "[ours] D8",
                       ("flat", "position"))
    quantile: float = option(0.99, "share of normal training scores below the threshold "
                             "[ours] D1")
    cache: str = option("auto", "teacher features in memory, in a temporary file, or computed "
                        "anew; auto: ram if half of the free memory holds them [ours] D2",
                        ("auto", "ram", "disk", "off"))
    checkpoint: str = option(None, "checkpoint to read (eval, predict, --resume); default: "
                             "checkpoint.pt in --out; for train: a trained detector to start from")
    resume: bool = option(False, "go on from the checkpoint of an interrupted training")
    workers: int = option(4, "processes that read images, at most one a CPU core")

    def __post_init__(self) -> None:
        """Raise UserError for a value that cannot work."""
        for name in ("iters", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {getattr(self, name)}: must be above 0")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")
        if self.image_size < 32 or self.image_size % 32:
            raise UserError(f"--image-size {self.image_size}: must be a multiple of 32, since the "
                            "one-class code has 1/32 of the resolution")
        if self.batch_size * (self.image_size // 32) ** 2 < 2:
            raise UserError("--batch-size 1: BatchNorm needs two values a channel; use at least 2, "
                            "or a larger --image-size")
        if not 0 < self.quantile <= 1:
            raise UserError(f"--quantile {self.quantile}: must be above 0 and at most 1")


# What replaces the defaults on the demo set, so that two CPU cores do it in minutes. [ours] D3
DEMO = {"teacher": "resnet18", "weights": "none", "image_size": 128, "iters": 200, "workers": 0}
# Flags that may differ between a checkpoint and the command that reads it.
MAY_DIFFER = ("out", "device", "cache", "checkpoint", "resume", "workers")
NAME = "revdist"  # of the detector, in checkpoints


# ==== shared: data
SUFFIXES = {s for s, f in Image.registered_extensions().items() if f in Image.OPEN}


@dataclass(frozen=True)
class Sample:
    """One image. `cls` serves the report and the oracle only; no model ever sees it."""

    path: Path
    cls: str
    label: int  # 0 normal, 1 anomalous: from the folder (a resized mask can lose a tiny defect)
    mask: Path | None = None


def images_in(folder: Path, recursive: bool = False) -> list[Path]:
    """Image files below `folder` in name order, without hidden ones (macOS leaves some); a dangling
    link is one, which load_image() will report."""
    if folder.is_dir():
        os.listdir(folder)  # says so if it may not be read; glob() would find nothing there
    found = folder.rglob("*") if recursive else folder.glob("*")
    return sorted(p for p in found if p.suffix.lower() in SUFFIXES and p.name[0] != "."
                  and (p.is_file() or p.is_symlink()))


def pair_masks(images: list[Path], folder: Path) -> dict[Path, Path]:
    """Match masks to images by stem (`000` with `000_mask` or `000`), never by sort order.

    Raises UserError for an image without mask, a mask without image, or two of one stem.
    """
    by_stem = {}
    for path in images_in(folder):
        if by_stem.setdefault(path.stem.removesuffix("_mask"), path) != path:
            raise UserError(f"two masks for one image: {path}; remove one")
    pairs = {image: by_stem.pop(image.stem, None) for image in images}
    for image, mask in pairs.items():
        if mask is None:
            raise UserError(f"no mask for {image}; expected {folder / image.stem}_mask.png "
                            "(give every defective image a mask, or remove all ground_truth)")
    for mask in by_stem.values():
        raise UserError(f"mask without image: {mask}; remove it or add the image")
    return pairs


def read_mvtec(root: Path) -> tuple[list[Sample], list[Sample]]:
    """Read an MVTec-style tree: <class>/{train/good,test/<kind>,ground_truth/<kind>}/*."""
    classes = sorted(d for d in root.iterdir() if (d / "train").is_dir() or (d / "test").is_dir())
    if (root / "train").is_dir():  # the folder of a single class is a data set too
        classes = [root.resolve()]
    has_masks = any(images_in(d / "ground_truth", recursive=True) for d in classes)
    train, test = [], []
    for d in classes:
        normal = images_in(d / "train/good")
        if not normal:
            raise UserError(f"no training images in {d / 'train/good'}; put normal images there")
        train += [Sample(p, d.name, 0) for p in normal]
        for kind in sorted({k.name for k in (*d.glob("test/*"), *d.glob("ground_truth/*"))}):
            images, label = images_in(d / "test" / kind), int(kind != "good")
            masks = pair_masks(images, d / "ground_truth" / kind) if label and has_masks else {}
            test += [Sample(p, d.name, label, masks.get(p)) for p in images]
    return train, test


def read_visa(root: Path) -> tuple[list[Sample], list[Sample]]:
    """Read the raw VisA archive by its own split file, split_csv/1cls.csv. Raises UserError."""
    path, splits = root / "split_csv/1cls.csv", {"train": [], "test": []}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                label = int(row["label"] != "normal")
                if label and not row["mask"]:
                    raise ValueError(f"no mask for {row['image']}")
                mask = root / row["mask"] if label else None
                sample = Sample(root / row["image"], row["object"], label, mask)
                splits.setdefault(row["split"], []).append(sample)
    except KeyError as e:
        raise UserError(f"{path} lacks the column {e}; take the file from VisA's archive")
    except (TypeError, ValueError, csv.Error) as e:
        raise UserError(f"cannot read {path}: {e}; take the file from VisA's archive")
    return splits["train"], splits["test"]


def read_dataset(root: Path, test_only: bool = False) -> tuple[list[Sample], list[Sample]]:
    """Find out the layout of `root` and return (train, test) samples, those needed all readable.

    Raises UserError that names the folder or file and the remedy.
    """
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder")
    read = read_visa if (root / "split_csv/1cls.csv").is_file() else read_mvtec
    train, test = read(root)
    for part, samples in (("training", train), ("test", test)):
        if not samples:
            raise UserError(f"--data {root}: no {part} images; expected <class>/train/good/* and "
                            "<class>/test/*/* or split_csv/1cls.csv, see data/README.md")
        if len(samples) < process()[1]:
            raise UserError(f"--data {root}: {len(samples)} {part} images for {process()[1]} "
                            "processes; lower --nproc-per-node")
    check_samples(share(test if test_only else train + test))
    return train, test


def check_samples(samples: list[Sample]) -> None:
    """Decode every file once: a broken one must stop the run before the training, not after."""
    def check(sample: Sample) -> None:
        size = load_image(sample.path).size
        if sample.mask and load_mask(sample.mask).shape != size[::-1]:
            raise UserError(f"mask {sample.mask} has another size than its image "
                            f"({size[0]} x {size[1]}); redraw it at that size")

    with ThreadPoolExecutor() as pool:  # threads suffice: Pillow decodes without the GIL
        list(progress(pool.map(check, samples), "checking images", total=len(samples)))


def load_image(path: Path) -> Image.Image:
    """Any image file as 8-bit RGB, upright. Raises UserError if it cannot be read."""
    try:
        str(path).encode()  # a name that is no Unicode could not stand in scores.csv
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("32-bit float pixels have no fixed range, save it in 8 or 16 bits")
            if image.mode.startswith("I"):  # 16-bit grey: convert() alone would clip it to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as e:  # Pillow's readers raise many kinds for a broken file
        reason = "no such file" if isinstance(e, FileNotFoundError) else e
        raise UserError(f"cannot read image {path}: {reason}; repair, replace or remove it")


def load_mask(path: Path) -> np.ndarray:
    """A ground-truth mask as (H, W) bool. Anything but 0 is a defect: VisA's are indices 1-9."""
    try:
        with Image.open(path) as image:
            mask = np.asarray(image.convert("RGB") if image.mode in ("RGBA", "LA") else image) != 0
    except MemoryError:
        raise
    except Exception as e:
        raise UserError(f"cannot read mask {path}: {e}; repair or replace it")
    return mask.any(-1) if mask.ndim == 3 else mask


def load_masks(samples: list[Sample], size: int) -> Tensor | None:
    """Ground truth as (N, size, size) bool, or None for a set without masks.

    Binarised first and resized (nearest neighbour) after: the other way round thin defects blur.
    """
    if not any(s.mask for s in samples):
        return None
    masks = torch.zeros(len(samples), size, size, dtype=torch.bool)
    for i, s in enumerate(samples):
        if s.mask:
            small = Image.fromarray(load_mask(s.mask)).resize((size, size), Image.NEAREST)
            masks[i] = torch.from_numpy(np.asarray(small).copy())
    return masks


@dataclass(frozen=True)
class Preprocess:
    """What the teacher expects: a square with sides of `size` pixels, channels normalised. An image
    that is not square is squashed. [ours] D20"""

    size: int
    mean: tuple = (0.485, 0.456, 0.406)  # ImageNet
    std: tuple = (0.229, 0.224, 0.225)
    resample: int = Image.BILINEAR

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image of any shape, squashed to (3, size, size) float32."""
        image = image.resize((self.size, self.size), self.resample)
        x = (np.asarray(image, np.float32) / 255 - np.float32(self.mean)) / np.float32(self.std)
        return torch.from_numpy(x.transpose(2, 0, 1))  # PyTorch wants channels first


class Images(Dataset):
    """The preprocessed images of a list of samples."""

    def __init__(self, samples: list[Sample], preprocess: Preprocess) -> None:
        self.samples, self.preprocess = samples, preprocess

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Tensor:
        return self.preprocess(load_image(self.samples[i].path))
# ==== end shared


# ---- frozen teacher ------------------------------------------------------------------------------
def resnet_names() -> list[str]:
    """The torchvision models that can be a teacher."""
    kinds = ("resnet", "wide_resnet", "resnext")
    return [n for n in torchvision.models.list_models() if n.startswith(kinds)]


class Teacher(nn.Module):
    """RevDist's teacher, as in RD: a ResNet up to layer3, no gradients, always in eval mode.

    forward: (B, 3, S, S) -> [(B, C1, S/4, S/4), (B, C2, S/8, S/8), (B, C3, S/16, S/16)], float16.
    Half precision always, cached or not, so that --cache changes the time and nothing else; float16
    and not bfloat16, because after BatchNorm the values are small and want digits, not range.
    RevDist reads nothing of layer4, so layer4 is not run.
    Raises UserError for an unknown name and for weights that cannot be had or do not fit.
    """

    def __init__(self, name: str, weights: str, seed: int) -> None:
        super().__init__()
        if name not in resnet_names():
            raise UserError(f"--teacher {name}: unknown; choose one of {', '.join(resnet_names())}")
        self.random = weights == "none"
        with torch.random.fork_rng(devices=[]):  # a seed's teacher is the same whatever ran before
            torch.manual_seed(seed)
            resnet = torchvision.models.get_model(name, weights=None)
        if not self.random:
            load_weights(resnet, name, weights)
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.layer1, self.layer2, self.layer3 = resnet.layer1, resnet.layer2, resnet.layer3
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> nn.Module:
        """Stay in eval mode whatever the parent does: the BatchNorm statistics are frozen too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Tensor]:
        with autocast(x.device, torch.float16):
            f1 = self.layer1(self.stem(x))
            f2 = self.layer2(f1)
            f3 = self.layer3(f2)
        return [f.half() for f in (f1, f2, f3)]

    @torch.no_grad()
    def estimate_statistics(self, batches: Iterable) -> None:
        """Give a random teacher the BatchNorm statistics of the training images. [ours] D3

        Fresh statistics (mean 0, variance 1) let the activations of a random ResNet drift from
        layer to layer until all images look alike. momentum=None weighs all batches alike; the
        default would forget the first ones.
        """
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        for m in norms:
            m.train()
            m.momentum = None
            m.reset_running_stats()
        for x in batches:
            self(x)
        for m in norms:
            m.eval()

    def identity(self) -> str:
        """A hash of the weights: a checkpoint fits only the teacher that it was trained with."""
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_weights(resnet: nn.Module, name: str, weights: str) -> None:
    """Fill a ResNet from --weights: a local file, else a torchvision tag (downloaded once)."""
    remedy = "give a local file with --weights FILE, or --weights none for a random teacher"
    tags = {w.name: w for w in torchvision.models.get_model_weights(name)}
    if not Path(weights).is_file() and weights not in tags:
        raise UserError(f"--weights {weights}: no file and none of {', '.join(tags)}; {remedy}")
    try:
        state = (torch.load(weights, map_location="cpu", weights_only=True)
                 if Path(weights).is_file() else
                 tags[weights].get_state_dict(progress=sys.stderr.isatty(), check_hash=True))
        resnet.fc = nn.Identity()  # the classifier is not used: any number of classes will do
        resnet.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    except OSError as e:  # URLError, of a failed download, is one
        source = tags[weights].url if weights in tags else weights
        raise UserError(f"--weights {weights}: cannot get {source} ({e}); {remedy}")
    except Exception as e:  # torch.load raises many kinds for a file that is no state dict
        raise UserError(f"--weights {weights} does not fit {name}: {str(e)[:300]}; {remedy}")


# ---- RevDist student -----------------------------------------------------------------------------
def halve(channels_in: int, channels_out: int) -> nn.Sequential:
    """3x3 convolution, stride 2: (B, in, H, W) -> (B, out, H/2, W/2)."""
    return nn.Sequential(conv3x3(channels_in, channels_out, stride=2),
                         nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


def residual_stage(like: nn.Module, inputs: int, planes: int, depth: int,
                   up: bool) -> nn.Sequential:
    """`depth` residual blocks of the kind in ResNet `like`; the first halves or doubles H and W.

    A stage that doubles is the teacher's stage mirrored: where the first block had a stride-2
    convolution it has a 2x2 transposed one, in the main path and in the shortcut.
    """
    block, outputs = type(like.layer1[0]), planes * type(like.layer1[0]).expansion
    width = {} if block is BasicBlock else {"groups": like.groups, "base_width": like.base_width}
    if up:
        shortcut = nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
    else:
        shortcut = conv1x1(inputs, outputs, stride=2)
    first = block(inputs, planes, 1 if up else 2,
                  nn.Sequential(shortcut, nn.BatchNorm2d(outputs)), **width)
    if up:
        name = "conv1" if block is BasicBlock else "conv2"  # where that block kind has its stride
        conv = getattr(first, name)
        setattr(first, name, nn.ConvTranspose2d(conv.in_channels, conv.out_channels, 2, stride=2,
                                                groups=conv.groups, bias=False))
    return nn.Sequential(first, *(block(outputs, planes, **width) for _ in range(depth - 1)))


class Student(nn.Module):
    """What RevDist trains, in RD's shapes: fusion, one-class bottleneck (OCBE), mirrored decoder.

    forward: the teacher's [(B, C1, S/4, S/4), (B, C2, S/8, S/8), (B, C3, S/16, S/16)] -> the same
    shapes, reproduced from a code of (B, 2 * C3, S/32, S/32). 83.80 M parameters for
    wide_resnet50_2.
    """

    def __init__(self, teacher_name: str) -> None:
        super().__init__()
        with torch.device("meta"):  # only its layout is read, so no memory is spent on it
            like = torchvision.models.get_model(teacher_name, weights=None)
        e = type(like.layer1[0]).expansion
        c1, c2, c3 = 64 * e, 128 * e, 256 * e
        self.fuse1 = nn.Sequential(halve(c1, c2), halve(c2, c3))
        self.fuse2 = halve(c2, c3)
        self.bottleneck = residual_stage(like, 3 * c3, 512, len(like.layer4), up=False)
        self.decode3 = residual_stage(like, 2 * c3, 256, len(like.layer1), up=True)
        self.decode2 = residual_stage(like, c3, 128, len(like.layer2), up=True)
        self.decode1 = residual_stage(like, c2, 64, len(like.layer3), up=True)
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        f1, f2, f3 = features
        code = self.bottleneck(torch.cat([self.fuse1(f1), self.fuse2(f2), f3], dim=1))
        d3 = self.decode3(code)
        d2 = self.decode2(d3)
        return [self.decode1(d2), d2, d3]


class RevDist(nn.Module):
    """Reverse distillation, the detector under CADA: its name is [paper], its shapes are RD's.

    The decoder learned to reproduce the teacher's features e of normal images only; where its d
    fails, the image is anomalous: A(h,w) = mean over layers of 1 - <e,d> / (|e||d|). [author]

    This is all that CADA and the shared code need of a detector: `preprocess` for images, `teacher`
    for frozen features of them; called, it gives the loss on these, and `describe` turns them into
    pooled features and a raw anomaly map.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.preprocess = Preprocess(cfg.image_size)
        self.flat = cfg.loss == "flat"
        self.teacher = Teacher(cfg.teacher, cfg.weights, cfg.seed)
        self.student = Student(cfg.teacher)

    def decode(self, features: list[Tensor]) -> tuple[list, list]:
        """The student's version of the teacher's features, both in float32 for the cosines."""
        # channels_last, like the weights: cuDNN's own layout (on a CPU no difference was measured).
        encoded = [f.float().contiguous(memory_format=torch.channels_last) for f in features]
        with autocast(features[0].device, torch.bfloat16):
            decoded = self.student(encoded)
        return encoded, [d.float() for d in decoded]

    def forward(self, features: list[Tensor]) -> Tensor:
        """The loss: sum over layers of 1 - cosine, each layer one long vector of C*H*W [author], or
        by position and averaged (--loss position) [ours] D8. Returns a scalar in 0..6."""
        start = 1 if self.flat else 2  # flatten (B, C, H, W) from C on, or (B, C, H*W) from H on
        return sum((1 - F.cosine_similarity(e.flatten(start), d.flatten(start), dim=1)).mean()
                   for e, d in zip(*self.decode(features)))

    def describe(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Teacher features -> (pooled (B, 2 * (C1+C2+C3)), raw anomaly map (B, S, S) in 0..2).

        Pooled over the whole image, frozen features tell the class more than the defect: that is
        why CADA reads these and not the student's. Mean *and* standard deviation over the positions
        [ours] D6: with the mean alone, brightness drowns texture. align_corners=True [author] puts
        the corner values of a layer's map on the corner pixels, so the three layers line up.
        """
        size, maps = (self.preprocess.size,) * 2, 0
        for e, d in zip(*self.decode(features)):
            m = 1 - F.cosine_similarity(e, d, dim=1)[:, None]  # (B, 1, h, w)
            maps = maps + F.interpolate(m, size, mode="bilinear", align_corners=True)[:, 0] / 3
        pooled = [t for f in features for t in torch.std_mean(f.float(), dim=(2, 3))]
        return torch.cat(pooled, dim=1), maps


# ---- CADA ----------------------------------------------------------------------------------------
class CADA(nn.Module):
    """Predict (u, gamma), the mean and the maximum that anomaly maps of *normal* images of an
    image's class have, from its frozen features; normalise its map by them. [paper]

    The hard part: it must predict the statistics of a class, not of an image. A network trained on
    every image's own statistics learns the image's quirks, and a defect that moves the features
    takes u and gamma with it, which cancels the very signal. So our regressor is piecewise constant
    [ours] D5: k-means finds the *implicit classes* of the training set in feature space, k is where
    the silhouette is highest, and an image gets the mean statistics of its nearest centre. A defect
    then changes nothing unless it carries the pooled features over to another centre; and within
    an implicit class all images share one affine map, so their order stays.

    It knows nothing of the detector: any that has pooled features and maps will do.
    """

    MAX_CLASSES = 40  # the silhouette is tried for 2 .. so many implicit classes

    def __init__(self, in_features: int, classes: int = 1) -> None:
        """in_features: C of the pooled features. `classes` is needed only to load a state dict."""
        super().__init__()
        for name, shape in (("mean", in_features), ("std", in_features),
                            ("centres", (classes, in_features)), ("statistics", (classes, 2))):
            self.register_buffer(name, torch.zeros(shape))

    def fit(self, features: Tensor, maps: Tensor, seed: int = 0) -> CADA:
        """Learn from normal images: features (N, C), raw maps (N, H, W), float tensors on the CPU.
        No label, no gradient. Raises ValueError for other shapes."""
        if (features.shape[1:] != self.mean.shape or maps.ndim != 3
                or len(maps) != len(features)):
            raise ValueError(f"expected features (N, {len(self.mean)}) and maps (N, H, W), got "
                             f"{tuple(features.shape)} and {tuple(maps.shape)}")
        self.mean, self.std = features.mean(0), features.std(0, correction=0) + 1e-6
        x = self.direction(features).numpy()
        kmeans, per_image = implicit_classes(x, self.MAX_CLASSES, seed), map_statistics(maps)
        labels = torch.from_numpy(kmeans.labels_)
        self.centres = torch.from_numpy(kmeans.cluster_centers_).float()
        self.statistics = torch.stack([per_image[labels == k].mean(0)
                                       for k in range(len(self.centres))])
        return self

    def direction(self, features: Tensor) -> Tensor:
        """(N, C) -> unit vectors (N, C): features standardised, or the largest channels would
        decide alone; and without length, so that no defect can take an image far away. [ours] D6
        """
        return F.normalize((features - self.mean) / self.std)

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) -> u (N,) and gamma (N,), gamma > u: those of the nearest implicit class."""
        distance = torch.cdist(self.direction(features), self.centres,
                               compute_mode="donot_use_mm_for_euclid_dist")  # same in any batch
        u, gamma = self.statistics[distance.argmin(1)].unbind(1)
        return u, gamma

    def align(self, features: Tensor, maps: Tensor) -> Tensor:
        """(N, C) and (N, H, W) -> (N, H, W): 0 is the mean of normal maps of the class, 1 their
        maximum, whatever the class."""
        return normalise(maps, *self.predict(features))


def implicit_classes(x: np.ndarray, most: int, seed: int) -> KMeans:
    """k-means of feature directions (N, C) for the k in 2..most with the highest silhouette.

    The silhouette compares an image's distance to its own cluster with that to the next one, -1..1.
    k is sought on 2,000 images at most, whose distances are computed once for all k. Clusters of
    fewer than four are left out: one odd image far from all others would else make "that one
    against the rest" the best cut of all. It knows no k = 1, so that is left for training sets too
    small to cut. [ours] D5
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(x))[:2000])
    sample, distances = x[rows], pairwise_distances(x[rows])

    def silhouette(model: KMeans) -> float:
        sizes = np.bincount(model.labels_, minlength=model.n_clusters)
        kept = sizes[model.labels_] >= 4
        if sizes.min() == 0 or (sizes >= 4).sum() < 2:  # equal images leave clusters empty
            return -1
        return silhouette_score(distances[np.ix_(kept, kept)], model.labels_[kept],
                                metric="precomputed")

    models = [KMeans(k, n_init=3, random_state=seed).fit(sample)
              for k in range(2, min(most, len(sample) // 4) + 1)]
    scores = [silhouette(m) for m in models] + [-1]
    best = scores.index(max(scores))
    k = models[best].n_clusters if scores[best] > -1 else 1
    return KMeans(k, n_init=3, random_state=seed).fit(x)


def map_statistics(maps: Tensor) -> Tensor:
    """(N, H, W) -> (N, 2): u, the mean, and gamma, the maximum, of each map; gamma > u even for a
    map without contrast."""
    u = maps.mean((1, 2))
    return torch.stack([u, maps.amax((1, 2)).maximum(u + 1e-6 * u.abs().clamp(min=1))], dim=1)


def normalise(maps: Tensor, u: Tensor, gamma: Tensor) -> Tensor:
    """A' = (A - u) / (gamma - u), image by image: (N, H, W), (N,), (N,) -> (N, H, W). [author]"""
    return (maps - u[:, None, None]) / (gamma - u)[:, None, None]


# ==== shared: map and score
def smooth(maps: Tensor) -> Tensor:
    """Gaussian blur of (N, H, W) maps, sigma 4 pixels at 256 x 256 and in proportion elsewhere
    [ours] D4.

    Replicate padding keeps a constant map constant, and the kernel sums to one: so blurring
    commutes with (A - u) / (gamma - u), and normalising first [author] or after is the same.
    """
    sigma = 4 * maps.shape[-1] / 256
    r = math.ceil(4 * sigma)
    blurred = torch.empty_like(maps)
    for x, out in zip(maps.split(64), blurred.split(64)):  # in pieces: padding makes copies
        x = F.pad(x[:, None], (r, r, r, r), mode="replicate")
        for kernel in ((1, 2 * r + 1), (2 * r + 1, 1)):  # axis by axis: 2k taps, not k * k
            x = gaussian_blur(x, kernel, [sigma, sigma])
        out.copy_(x[:, 0, r:-r, r:-r])
    return blurred


def image_score(maps: Tensor) -> Tensor:
    """Mean of the highest 1 % of each map: (N, H, W) -> (N,). Steadier than the maximum. [author]
    """
    flat = maps.flatten(1)
    return flat.topk(max(1, flat.shape[1] // 100), dim=1).values.mean(1)


@torch.no_grad()
def describe_all(detector: nn.Module, batches: Iterable) -> tuple:
    """Run the detector over the teacher features of this process's share of the images.

    Returns pooled features (N, C) and raw maps (N, S, S) of all shares, on the CPU; None on ranks
    above 0.
    """
    detector.eval()  # BatchNorm by its running statistics: a score must not depend on its batch
    pooled, maps = map(torch.cat, zip(*([t.cpu() for t in detector.describe(f)] for f in batches)))
    if not maps.isfinite().all():
        raise UserError("the anomaly maps are not finite: the training diverged; lower --lr")
    return gather(pooled), gather(maps)


def quantile(scores: Tensor, q: float) -> float:
    """The q-quantile of normal training scores: a threshold that no test label has touched.
    [ours] D1"""
    return torch.quantile(scores.double(), q).item()
# ==== end shared


# ==== shared: metrics
CPU = torch.device("cpu")


def image_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """I-AUROC, I-AP, I-F1max in 0..1 of (N,) scores and 0/1 labels; NaN if one label is missing."""
    if labels.min() == labels.max():
        return dict.fromkeys(("I-AUROC", "I-AP", "I-F1max"), math.nan)
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {"I-AUROC": roc_auc_score(labels, scores),
            "I-AP": average_precision_score(labels, scores), "I-F1max": f1.max()}


def region_weights(masks: Tensor) -> tuple[Tensor, int]:
    """1 / area of its 8-connected region, for each anomalous pixel in the order of maps[masks]; and
    the number of regions."""
    weights, regions = [torch.zeros(0)], 0
    for i in masks.flatten(1).any(1).nonzero().flatten().tolist():
        labelled, n = ndimage.label(masks[i].numpy(), np.ones((3, 3)))
        labels = labelled[labelled > 0]
        weights.append(torch.from_numpy(1 / np.bincount(labels)[labels]))
        regions += n
    return torch.cat(weights), regions


def pixel_metrics(maps: Tensor, masks: Tensor, device: torch.device = CPU) -> dict[str, float]:
    """P-AUROC, P-AP, P-F1max, AUPRO in 0..1 of (N, H, W) maps and bool masks, all from one sort.

    Every distinct value is a threshold. But overlap and true positives change only at values of
    anomalous pixels, which are few: so the curves have two points for each of those, just before
    and at it, and straight lines between. AUPRO is the mean overlap with the ground-truth regions
    against the pixel false-positive rate, up to 0.3. Sums are float64: float32 loses integers above
    2^24. Memory on the CPU: about 10 bytes a pixel if 7 % are anomalous. NaN if a label is missing.
    """
    torch.cuda.empty_cache()  # what training left unused counts as free then
    if device.type == "mps" or device.type == "cuda" and (
            torch.cuda.mem_get_info(device)[0] < 40 * maps.numel()):
        device = CPU  # MPS has no float64; a small GPU not the memory
    (weights, regions), flat = region_weights(masks), maps.flatten().to(device)
    n, positives = len(flat), len(weights)
    if not 0 < positives < n:
        return dict.fromkeys(("P-AUROC", "P-AP", "P-F1max", "AUPRO"), math.nan)
    # NumPy sorts several times faster on a CPU, and makes no indices.
    every = torch.from_numpy(np.sort(flat.numpy())) if device.type == "cpu" else flat.sort().values
    values, order = maps[masks].to(device).sort(descending=True)
    ends = torch.ones_like(values, dtype=torch.bool)  # the last pixel of each run of equal values
    ends[:-1] = values[1:] != values[:-1]
    thresholds = values[ends]
    tp = ends.nonzero()[:, 0].double() + 1
    overlap = weights.double().to(device)[order].cumsum(0)[ends] / regions
    flagged, before = (n - torch.searchsorted(every, thresholds, right=right).double()
                       for right in (False, True))  # pixels >= and > each threshold
    zero, negatives = tp.new_zeros(1), n - positives

    def curve(at: Tensor, last: float) -> Tensor:
        """From the origin: what holds just before and at each threshold; and at the very end."""
        earlier = torch.cat([zero, at[:-1]])
        return torch.cat([zero, torch.stack([earlier, at], dim=1).flatten(), zero + last])

    points = torch.stack([before, flagged], dim=1).flatten()
    tps, overlap = curve(tp, positives), curve(overlap, overlap[-1])
    tpr, fpr = tps / positives, (torch.cat([zero, points, zero + n]) - tps) / negatives
    inside = int((fpr <= 0.3).sum())
    part = (0.3 - fpr[inside - 1]) / (fpr[inside] - fpr[inside - 1])  # 0.3 lies inside a segment
    edge = overlap[inside - 1] + part * (overlap[inside] - overlap[inside - 1])
    below = torch.trapezoid(overlap[:inside], fpr[:inside])
    below = below + (0.3 - fpr[inside - 1]) * (overlap[inside - 1] + edge) / 2
    gained = torch.diff(tp, prepend=zero) / positives
    return {"P-AUROC": torch.trapezoid(tpr, fpr).item(),
            "P-AP": (gained * tp / flagged).sum().item(),
            "P-F1max": (2 * tp / (flagged + positives)).max().item(),
            "AUPRO": below.item() / 0.3}


def summarise(scores: np.ndarray, labels: np.ndarray, classes: np.ndarray,
              maps: Tensor | None = None, masks: Tensor | None = None,
              device: torch.device = CPU) -> dict:
    """All metrics by both protocols: {"pooled": {}, "class_mean": {}, "per_class": {class: {}}}.

    pooled: all classes in one ranking, as one threshold sees them (absolute-unified).
    class_mean: a ranking per class, then the unweighted mean (model-unified); a class without good
    or without defective images has no such metric (NaN) and does not count.
    """
    def metrics(rows: np.ndarray) -> dict[str, float]:
        found = image_metrics(scores[rows], labels[rows])
        return found | ({} if masks is None else pixel_metrics(maps[rows], masks[rows], device))

    per_class = {c: metrics(np.flatnonzero(classes == c)) for c in sorted(set(classes))}
    pooled = metrics(np.arange(len(scores)))
    mean = {}
    for key in pooled:
        values = [m[key] for m in per_class.values() if not math.isnan(m[key])]
        mean[key] = sum(values) / len(values) if values else math.nan
    return {"pooled": pooled, "class_mean": mean, "per_class": per_class}
# ==== end shared


# ==== shared: feature cache
def free_memory() -> int | None:
    """Bytes of memory that each process can have without swapping, or None where the system does
    not tell (Windows, macOS). A container's own limit counts."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if "MemAvailable" in line)
    except OSError:
        return None
    with suppress(OSError, ValueError):  # no such file, or "max"
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text())
                       for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class FeatureCache:
    """The teacher's features of all training images, computed once, float16. [ours] D2

    Training uses no augmentation, so every epoch would compute the same ones again. One float16
    array (N, values per image), in memory or in an unnamed file in `folder`: it goes with the
    process, even a killed one, so it can never be stale.
    """

    def __init__(self, encode: Callable, n: int, batches: Iterable, where: str,
                 folder: Path) -> None:
        """`batches` yields the `n` images in order, (B, 3, S, S) each."""
        row = 0
        for x in batches:
            features = encode(x)
            if row == 0:
                self.shapes = [f.shape[1:] for f in features]
                self.array = self.reserve((n, sum(s.numel() for s in self.shapes)), where, folder)
            values = torch.cat([f.flatten(1) for f in features], dim=1).cpu().numpy()
            self.array[row:row + len(values)] = values
            row += len(values)

    @staticmethod
    def reserve(shape: tuple[int, int], where: str, folder: Path) -> np.ndarray:
        """The float16 array, in memory or on disk. Raises UserError when the disk is too small."""
        size, free = 2 * shape[0] * shape[1], free_memory()
        if where == "auto":
            where = "ram" if free is not None and size < free / 2 else "disk"
        print(f"cache: {shape[0]} images, {size / 2**30:.2f} GiB of teacher features in "
              + ("memory" if where == "ram" else f"a temporary file in {folder}"), file=sys.stderr)
        if where == "ram" and free is not None and size > free:
            raise UserError(f"--cache ram: only {free / 2**30:.2f} GiB of memory are free; use "
                            "--cache disk or --cache off")
        if where == "ram":
            return np.empty(shape, np.float16)
        try:
            if shutil.disk_usage(folder).free < size:
                raise OSError("no space left")
            file = tempfile.TemporaryFile(dir=folder)
            if hasattr(os, "posix_fallocate"):  # else a full disk would kill the process (SIGBUS)
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, np.float16, "r+", shape=shape)
        except OSError as e:
            raise UserError(f"--cache disk: cannot reserve {size / 2**30:.1f} GiB in {folder} "
                            f"({e}); free the space, choose another --out, or use --cache off")

    def __len__(self) -> int:
        return len(self.array)

    def load(self, rows: list[int], device: torch.device) -> list[Tensor]:
        """The features of some images as the teacher gives them: a list of layers, (B, ...)."""
        values = torch.from_numpy(self.array[rows])
        if device.type == "cuda":  # pinned memory is what can be copied while the GPU works
            values = values.pin_memory()
        parts = values.to(device, non_blocking=True).split([s.numel() for s in self.shapes], dim=1)
        return [p.unflatten(1, s) for p, s in zip(parts, self.shapes)]


def feature_batches(source: FeatureCache | Images, batches: list[list[int]], teacher: nn.Module,
                    device: torch.device, workers: int) -> Iterator[list[Tensor]]:
    """Yield the teacher's features for lists of indices: from a FeatureCache, or (--cache off) from
    the images, computed anew."""
    if isinstance(source, FeatureCache):
        for rows in batches:
            yield source.load(rows, device)
    else:
        for x in image_loader(source, device, workers, batch_sampler=batches):
            yield teacher(x)


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C is the main process's affair: a worker that ended would take the running step along.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def image_loader(images: Images, device: torch.device, workers: int,
                 **batching: object) -> Iterator[Tensor]:
    """Batches of images (B, 3, S, S) on the device. Its generator is its own, so that loading draws
    nothing from the one that training uses, and a resumed run draws the same."""
    workers = min(workers, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    loader = DataLoader(images, num_workers=workers, worker_init_fn=ignore_interrupt,
                        pin_memory=device.type == "cuda", generator=torch.Generator(), **batching)
    for x in loader:  # in the layout that convolutions are fast in
        yield x.to(device, memory_format=torch.channels_last, non_blocking=True)


def image_batches(images: Images, cfg: Config, device: torch.device) -> Iterable[Tensor]:
    """Preprocessed images in order, batch by batch, on the device."""
    return progress(image_loader(images, device, cfg.workers, batch_size=cfg.batch_size), "images",
                    total=math.ceil(len(images) / cfg.batch_size))


def in_order(n: int, batch_size: int) -> list[list[int]]:
    """0..n-1 in consecutive batches, the last one smaller."""
    return [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]


def shuffled(n: int, batch_size: int, steps: int, seed: int, rank: int = 0) -> list[list[int]]:
    """The batches of a whole training run, epoch after epoch, decided by seed and rank alone: so a
    resumed run goes on with exactly the batches that it would have had."""
    generator = torch.Generator().manual_seed(seed + 1_000_000 * rank)
    epochs = math.ceil(steps * batch_size / n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    return order[:steps * batch_size].view(steps, batch_size).tolist()
# ==== end shared


# ==== shared: errors and files
class UserError(Exception):
    """A mistake the user can mend. main() prints its one line and exits with code 2."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name `path` only if the block succeeds.

    Raises UserError when the file cannot be written (no permission, full disk).
    """
    partial = path.with_name("partial-" + path.name)  # keeps the suffix: savers read it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        reason = "the disk is full or not writable" if isinstance(e, RuntimeError) else e.strerror
        raise UserError(f"cannot write {path}: {reason}; free the space or choose another --out")
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Create the output folder before hours of work, not after, and keep other runs out of it: the
    files of two would mix. The lock goes with the process, even a killed one.

    Raises UserError if it cannot be written to, or if another run has it.
    """
    lock = FileLock(path / ".lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            if process()[0] == 0:  # under torchrun only rank 0 writes
                lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"--out {path}: another run is writing there; choose another")
    except (OSError, NotImplementedError) as e:  # the latter: a file system without locks
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"--out {path}: cannot write there ({reason}); choose another")
    try:
        yield path
    finally:
        lock.release()


def one_line(error: BaseException) -> str:
    """What to tell the user about an error, in one line; a bug of ours is raised again, unchanged.

    Out of memory has many faces: CUDA, cuBLAS, MPS and CPU tensors have each their own message, and
    processes that read images run out of shared memory (in Docker) with a bus error.
    """
    text = " ".join(str(error).split()).encode(errors="backslashreplace").decode()
    if isinstance(error, UserError):
        return text
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted; --resume goes on from the last checkpoint, if any"
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}; grant it, or use another file or folder"
    if isinstance(error, MemoryError) or any(k in text.lower() for k in (
            "out of memory", "can't allocate memory", "not enough memory", "alloc_failed",
            "bus error")):
        return ("out of memory; lower --batch-size or --image-size, use --cache disk, or "
                "--workers 0 if it is the shared memory of a container")
    if isinstance(error, dist.DistError) or "/gloo/" in text:
        return "lost the connection to another process; torchrun tells below which one ended"
    raise error
# ==== end shared


# ==== shared: checkpoint
def checkpoint_path(given: dict) -> Path:
    """--checkpoint, else checkpoint.pt in --out."""
    return Path(given.get("checkpoint") or Path(given.get("out", Config.out)) / "checkpoint.pt")


def random_states() -> dict:
    """The states of PyTorch's random generators: dropout, where there is any, draws from them."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict) -> None:
    """Undo what ran since random_states(); a GPU's state only where there is a GPU."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def save_checkpoint(path: Path, content: dict) -> None:
    """Write tensors and plain values, whole or not at all: a kill never leaves half a file."""
    with atomic(path) as partial:
        torch.save(content, partial)


def load_checkpoint(path: Path, detector: str) -> dict:
    """Read what save_checkpoint() wrote. Raises UserError if it holds no such detector."""
    if not path.is_file():
        raise UserError(f"--checkpoint {path}: no such file; train first, or name another")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many kinds for a file that it cannot read
        raise UserError(f"--checkpoint {path} is not a checkpoint ({type(e).__name__}); "
                        "name one that cada.py or cnc.py wrote")
    found = content.get("detector") if isinstance(content, dict) else None
    if found != detector:
        raise UserError(f"--checkpoint {path}: its detector is {found}, not {detector}; name "
                        "another file (cada.py: or another --base)")
    return content


def stored_config(content: dict, given: dict, free: tuple, path: Path) -> dict:
    """The checkpoint's settings with the flags in `free` taken from the command line; --out is by
    default the checkpoint's folder.

    Raises UserError for any other flag: the numbers would no longer be those of the checkpoint.
    --weights may name the same weights in another place, unless the checkpoint holds the teacher.
    """
    free += ("weights",) if content["teacher"]["state"] is None else ()
    for name, value in given.items():
        if name not in free and value != content["config"].get(name):
            raise UserError(f"--{name.replace('_', '-')} {value}: {path} was trained with "
                            f"{content['config'].get(name)}; drop the flag or train anew")
    return (content["config"] | {"out": str(path.parent)}
            | {k: v for k, v in given.items() if k in free})


def check_teacher(teacher: nn.Module, content: dict) -> None:
    """Give a random teacher its stored weights; of any other, compare the identity.

    Raises UserError if the teacher at hand is not the one the checkpoint was trained with.
    """
    if content["teacher"]["state"] is not None:
        teacher.load_state_dict(content["teacher"]["state"])
    if teacher.identity() != content["teacher"]["identity"]:
        raise UserError("the checkpoint was trained with another teacher than these --weights; "
                        "give it the weights that it was trained with")
# ==== end shared


# ==== shared: report
def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "open_clip_torch", "numpy", "scikit-learn"):
        with suppress(metadata.PackageNotFoundError):  # cada.py works without open_clip
            found[name] = metadata.version(name)
    return found


def without_nan(value: object) -> object:
    """NaN is no JSON: an undefined metric becomes null."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def table(results: dict[str, dict]) -> str:
    """Class by class, then class mean and pooled; one line a variant (raw, cada, oracle), in %."""
    first = next(iter(results.values()))
    rows = [(c, lambda r, c=c: r["per_class"][c]) for c in first["per_class"]]
    rows += [("class mean", lambda r: r["class_mean"]), ("pooled", lambda r: r["pooled"])]
    width = max(len(name) for name, _ in rows)
    lines = [" " * (width + 9) + "".join(f"{key:>9}" for key in first["pooled"])]
    for name, pick in rows:
        for i, (variant, result) in enumerate(results.items()):
            cells = ("-" if math.isnan(v) else f"{100 * v:.1f}" for v in pick(result).values())
            lines.append(f"{'' if i else name:<{width}}  {variant:<7}"
                         + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def write_json(path: Path, content: dict) -> None:
    """Write one JSON file, whole or not at all."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(without_nan(content), indent=2) + "\n")


def write_scores(path: Path, samples: list[Sample], columns: dict[str, np.ndarray]) -> None:
    """One row a test image: path, class, label, then the columns given."""
    with atomic(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "label", *columns])
        for i, s in enumerate(samples):
            writer.writerow([s.path, s.cls, s.label, *(c[i].item() for c in columns.values())])


# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, VERMILION = "#0072B2", "#D55E00"


def save_figure(path: Path, figure: Figure) -> None:
    """Write a PNG, whole or not at all."""
    with atomic(path) as partial:
        figure.savefig(partial, dpi=150, bbox_inches="tight", facecolor="white")


def middle(samples: list[Sample], label: int) -> dict[str, int]:
    """{class: index} of each class's middle good (0) or defective (1) image: not picked by hand."""
    found = {}
    for i, s in enumerate(samples):
        if s.label == label:
            found.setdefault(s.cls, []).append(i)
    return {c: rows[len(rows) // 2] for c, rows in found.items()}


def picture_rows(samples: list[Sample], masks: Tensor | None, layers: dict,
                 label: int) -> list[tuple]:
    """Rows for plot_rows(): image, ground truth if defective, then `layers`, each {name: (maps
    (N, h, w), low, high, colours, meaning)}."""
    chosen, kind = middle(samples, label), ("good", "defective")[label]
    if not chosen:
        return []
    images = {c: load_image(samples[i].path).resize((160, 160)) for c, i in chosen.items()}
    rows = [(f"{kind}\nimage", images, 0, 255, "gray", "")]
    if label and masks is not None:
        truth = {c: masks[i] for c, i in chosen.items()}
        rows.append(("ground truth", truth, 0, 1, "gray", ""))
    return rows + [(name, {c: maps[i] for c, i in chosen.items()}, *scale)
                   for name, (maps, *scale) in layers.items()]


def plot_rows(path: Path, title: str, rows: list[tuple]) -> None:
    """A column a class; rows (name, {class: picture}, low, high, colours, meaning of the values).

    Every map of a row is drawn on one fixed scale, the bar at its right: scaling each image by
    itself would paint good images red.
    """
    classes = sorted({c for row in rows for c in row[1]})
    figure = Figure(figsize=(1.3 * len(classes) + 2.2, 1.3 * len(rows) + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), len(classes) + 1, squeeze=False,
                           width_ratios=[1] * len(classes) + [0.1])
    for (*cells, bar), (name, pictures, low, high, colours, meaning) in zip(axes, rows):
        for cell, cls in zip(cells, classes):
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
            if cls in pictures:
                shown = cell.imshow(np.asarray(pictures[cls]), cmap=colours, vmin=low, vmax=high)
        cells[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=12)
        if meaning:
            ticks = None if isinstance(colours, str) else range(1, colours.N + 1)
            figure.colorbar(shown, cax=bar, ticks=ticks).set_label(meaning, fontsize=10)
        else:
            bar.set_axis_off()
    for cell, cls in zip(axes[0][:-1], classes):
        cell.set_title(cls, fontsize=12, parse_math=False)  # the $ in a name is a $
    figure.suptitle(title, fontsize=14)
    save_figure(path, figure)


def threshold_line(threshold: float, quantile: float, anomalous: np.ndarray,
                   labels: np.ndarray) -> str:
    """How the one threshold does on the test set, which had no part in choosing it."""
    rates = (f"{100 * anomalous[labels == label].mean():.1f} % of the {name}"
             for label, name in ((0, "good"), (1, "defective")) if (labels == label).any())
    return (f"threshold {threshold:.4f} ({quantile} quantile of normal training scores): flags "
            + " and ".join(rates) + " test images")


def find_images(paths: list[str]) -> list[Sample]:
    """The images that PATH ... names, folders searched to the bottom, checked to be readable.

    Raises UserError for a folder without images and for a file that is none.
    """
    files = []
    for path in map(Path, paths):
        found = images_in(path, recursive=True) if path.is_dir() else [path]
        if not found:
            raise UserError(f"no images in {path}; name an image or a folder of images")
        files += [Sample(p, cls="", label=0) for p in found]
    check_samples(files)
    return files


def overlay_path(folder: Path, image: Path) -> Path:
    """Where an image's overlay goes: its own path below `folder`, so that no two collide."""
    parts = ["up" if p == ".." else p for p in image.parts if p != image.anchor]
    return folder.joinpath(*parts[:-1], parts[-1] + ".png")


def write_overlay(path: Path, image: Image.Image, anomaly_map: Tensor, full: float) -> None:
    """The image with its heat map on it, at the image's own size.

    One fixed scale: 0 is clear, `full` (twice the threshold) the hottest. Heat covers in proportion
    to its value: the farther below the threshold, the more an image looks like itself.
    """
    heat = (anomaly_map / full).clamp(0, 1).mul(255).byte().numpy()
    colour = Image.fromarray(colormaps["inferno"](heat, bytes=True)[..., :3])
    colour = colour.resize(image.size, Image.BILINEAR)
    heat = Image.fromarray(heat).resize(image.size, Image.BILINEAR)
    with atomic(path) as partial:
        Image.composite(colour, image, heat.point(lambda value: 0.8 * value)).save(partial)


def plot_distributions(path: Path, title: str, panels: dict[str, tuple], labels: np.ndarray,
                       classes: np.ndarray) -> None:
    """Score histograms by class, normal above the line and anomalous below it, each drawn to the
    same height, a panel a column.

    panels: {title: (scores (N,), threshold)}. Where the normal scores of all classes end at the
    same place, one threshold serves them all.
    """
    names = sorted(set(classes), reverse=True)  # upwards, as the axis goes
    figure = Figure(figsize=(1 + 5.5 * len(panels), 1.6 + 0.6 * len(names)), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (what, (scores, threshold)) in zip(axes, panels.items()):
        low, high = np.quantile(scores, [0, 0.98])
        bins = np.linspace(low, max(high, threshold) + 1e-9, 40)
        for row, name in enumerate(names):
            for label, sign, colour in ((0, 1, BLUE), (1, -1, VERMILION)):
                rows = (classes == name) & (labels == label)
                counts, _ = np.histogram(scores[rows].clip(bins[0], bins[-1]), bins)
                ax.stairs(row + sign * 0.42 * counts / max(counts.max(), 1), bins, baseline=row,
                          fill=True, color=colour,
                          label=None if row else ("normal", "anomalous")[label])
            ax.axhline(row, color="lightgrey", linewidth=0.8)
        ax.axvline(threshold, color="black", linestyle="--", label="threshold")
        ax.set_yticks(range(len(names)), names, fontsize=12, parse_math=False)
        ax.set_title(what, fontsize=12)
        ax.set_xlabel("image score (last bin: that and above)", fontsize=11)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(left=False)
    axes[0].set_ylabel("class", fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize=11, frameon=False)
    figure.suptitle(title, fontsize=14)
    save_figure(path, figure)
# ==== end shared


# ==== shared: command line and device
class Parser(argparse.ArgumentParser):
    """argparse that reports a wrong flag in one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse_args(argv: list[str] | None, config: type, description: str,
               *parents: argparse.ArgumentParser) -> tuple[str, list[str], dict]:
    """Read `[train|eval|predict] [PATH ...] [--flag value ...]`: the fields of `config`, and what
    parsers in `parents` know.

    Returns (command, paths, given): `given` holds only the flags that stand on the command line,
    so that a default can depend on the data set, and a checkpoint can say what must not change.
    """
    parser = Parser(description=description, parents=parents, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="train|eval|predict [PATH ...]",
                        help="what to do (default: train); predict takes images or folders")
    for f in fields(config):
        kind = {"int": int, "float": float}.get(f.type, str)
        how = {"action": "store_true"} if f.type == "bool" else {
            "type": kind, "choices": f.metadata["choices"],
            "metavar": None if f.metadata["choices"] else kind.__name__.upper()}
        default = "" if f.default is None or f.default is False else f" (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f.metadata["help"] + default, **how)
    given = vars(parser.parse_intermixed_args(argv))
    if "data" in given:  # absolute: eval and --resume compare it, and may run in another folder
        given["data"] = str(Path(given["data"]).resolve())
    words = given.pop("words")
    command = words.pop(0) if words else "train"
    if command not in ("train", "eval", "predict"):
        raise UserError(f"unknown command {command!r}; use train, eval or predict")
    if words and command != "predict":
        raise UserError(f"{command} takes no PATH ({words[0]!r}); name the data set with --data")
    if command == "predict" and not words:
        raise UserError("predict needs at least one image or folder")
    if command == "predict" and process()[1] > 1:
        raise UserError("predict runs in one process: start it without torchrun")
    return command, words, given


def choose_data(given: str | None) -> tuple[Path, str]:
    """The data set's folder and why: --data, else data/mvtec, else data/visa, else data/demo."""
    if given is not None:
        return Path(given), "given by --data"
    for name in ("mvtec", "visa"):
        if (HERE / "data" / name).is_dir():
            return HERE / "data" / name, f"found data/{name}"
    return HERE / "data/demo", ("no data/mvtec and no data/visa here, so the small procedural "
                                "demo set; data/README.md tells where to get the real ones")


def choose_device(name: str) -> torch.device:
    """Turn --device into a torch device, under torchrun each process into its own.

    Raises UserError if this machine does not have it.
    """
    count, local = process()[1], int(os.environ.get("LOCAL_RANK", 0))
    have = {"cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available() and count == 1, "cpu": True}
    if name == "auto":
        name = next(d for d in have if have[d])
    if not have[name]:
        raise UserError(f"--device {name}: this machine has none that PyTorch can use; "
                        "use --device auto or --device cpu")
    if name == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"--nproc-per-node: process {local + 1} finds only "
                            f"{torch.cuda.device_count()} GPUs; start one process a GPU")
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        torch.backends.cudnn.deterministic = True  # convolutions repeat; attention need not
    return torch.device(name, local) if name == "cuda" else torch.device(name)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Half precision on GPUs that have it, float32 elsewhere: not every CPU does. [ours] D19"""
    if device.type != "cuda" or (dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(
            including_emulation=False)):
        return nullcontext()
    return torch.autocast("cuda", dtype)


def progress(items: Iterable, what: str, **more: object) -> tqdm:
    """A progress bar with ETA on a terminal, silence elsewhere (a log file, a pipe, a test)."""
    return tqdm(items, desc=what, disable=None, leave=False, dynamic_ncols=True, **more)
# ==== end shared


# ==== shared: processes
def process() -> tuple[int, int]:
    """(rank, count): which of how many processes this is under torchrun; else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def joined_processes() -> Iterator[None]:
    """Under torchrun, join the other processes; elsewhere do nothing.

    Only rank 0 speaks, but whichever fails first says why, and the others end in silence. Tensors
    on a CPU travel by gloo, those on a GPU by NCCL.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    store, rank, count = next(dist.rendezvous("env://"))
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", store=store, rank=rank,
                            world_size=count, timeout=timedelta(hours=6))
    try:
        with (open(os.devnull, "w") as silence, redirect_stdout(silence if rank else sys.stdout),
              redirect_stderr(silence if rank else sys.stderr)):
            yield
            dist.all_reduce(torch.zeros(1))  # nobody leaves before rank 0 has got all and is done
    except (Exception, KeyboardInterrupt):
        if store.add("failed", 1) > 1:
            raise SystemExit(2)
        raise
    dist.destroy_process_group()


def share(samples: list) -> list:
    """Every count-th of the samples: those of this process."""
    rank, count = process()
    return samples[rank::count]


def gather(part: Tensor) -> Tensor | None:
    """Put the rows of all shares, on the CPU, into their old order on rank 0; None elsewhere."""
    rank, count = process()
    if count == 1:
        return part
    n = torch.tensor(len(part))
    dist.all_reduce(n)
    padded = part.new_zeros(-(-n.item() // count), *part.shape[1:])  # shares differ by one at most
    padded[:len(part)] = part
    parts = None if rank else [torch.empty_like(padded) for _ in range(count)]
    dist.gather(padded, parts)
    return None if rank else torch.stack(parts, dim=1).flatten(0, 1)[:n]


def sum_over_processes(x: Tensor) -> Tensor:
    """The same sum in every process, with gradient."""
    return all_reduce(x) if dist.is_initialized() else x


def data_parallel(detector: nn.Module) -> nn.Module:
    """The detector, as a function that gives the loss. Under torchrun DistributedDataParallel
    averages the gradients over the processes, whose batches are equally large."""
    if not dist.is_initialized():
        return detector
    return nn.parallel.DistributedDataParallel(detector)
# ==== end shared


# ==== shared: training a detector
@contextmanager
def polite_interrupt() -> Iterator[list]:
    """Let Ctrl-C wait for the end of a step: yields a list that is not empty once it was pressed.
    Pressed a second time, it interrupts at once."""
    pressed = []

    def handler(number: int, frame: types.FrameType | None) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def fit_detector(cfg: Config, detector: nn.Module, samples: list[Sample], device: torch.device,
                 content: dict | None) -> tuple:
    """Train on normal images, from where `content` (a checkpoint's) stopped; then describe them.

    Returns the checkpoint's new content, pooled features (N, C) and raw maps (N, S, S) of all
    samples; under torchrun the latter two on rank 0, None elsewhere. Each process caches, trains on
    and describes its own share of the images. Raises UserError as train_detector() does.
    """
    count = process()[1]
    if cfg.batch_size % count:
        raise UserError(f"--batch-size {cfg.batch_size}: must be a multiple of the {count} "
                        "processes, which share each batch; change it or --nproc-per-node")
    if detector.teacher.random and content is None:  # the same in every process
        everything = Images(samples, detector.preprocess)
        detector.teacher.estimate_statistics(image_batches(everything, cfg, device))
    images = Images(share(samples), detector.preprocess)
    source = images if cfg.cache == "off" else FeatureCache(
        detector.teacher, len(images), image_batches(images, cfg, device), cfg.cache,
        Path(cfg.out))
    content = train_detector(cfg, detector, source, len(samples), device, content)
    order = in_order(len(images), cfg.batch_size)
    batches = feature_batches(source, order, detector.teacher, device, cfg.workers)
    return content, *describe_all(detector, progress(batches, "anomaly maps", total=len(order)))
# ==== end shared


# ---- train, evaluate, predict --------------------------------------------------------------------
def configure(given: dict, path: Path | None = None) -> tuple[Config, dict | None]:
    """Settings for a fresh training, or those of the checkpoint at `path`, to go on from it."""
    if path:
        content = load_checkpoint(path, NAME)
        return Config(**stored_config(content, given, MAY_DIFFER, path)), content
    root, why = choose_data(given.get("data"))
    print(f"data: {root} ({why})", file=sys.stderr)
    defaults = DEMO if root.resolve() == (HERE / "data/demo").resolve() else {}
    return Config(**{**defaults, **given, "data": str(root.resolve())}), None


def build(cfg: Config, content: dict | None = None) -> tuple[RevDist, torch.device]:
    """The detector on its device, with the weights of a checkpoint if one is given."""
    device = choose_device(cfg.device)
    torch.manual_seed(cfg.seed)
    detector = RevDist(cfg)
    if content is not None:
        check_teacher(detector.teacher, content)
        detector.student.load_state_dict(content["student"])
    return detector.to(device, memory_format=torch.channels_last), device


def train(base: types.ModuleType, given: dict, started: float) -> None:
    """Train the detector of module `base`, or take a trained one (--checkpoint); fit CADA on the
    normal training images; evaluate once."""
    path = checkpoint_path(given) if given.keys() & {"checkpoint", "resume"} else None
    if "resume" not in given:
        given = {"out": Config.out} | given  # by default not into the detector's own folder
    cfg, content = base.configure(given, path)
    train_set, test_set = read_dataset(Path(cfg.data))
    detector, device = base.build(cfg, content)
    with output_folder(Path(cfg.out)) as out:
        base.say_what_runs(cfg, detector, device, train_set, test_set)
        content, features, maps = base.fit_detector(cfg, detector, train_set, device, content)
        cada = None
        if maps is not None:  # under torchrun: rank 0 alone
            cada = CADA(features.shape[1]).fit(features, maps, seed=cfg.seed)
            (u, gamma), scores = cada.predict(features), image_score(smooth(maps))
            aligned = (scores - u) / (gamma - u)  # a score is linear in its map: align it directly
            content |= {"threshold": quantile(scores, cfg.quantile), "cada": {
                "state": cada.state_dict(), "threshold": quantile(aligned, cfg.quantile),
                "oracle": class_statistics(maps, [s.cls for s in train_set])}}
            save_checkpoint(out / "checkpoint.pt", content)
        del maps  # gigabytes, on a real set
        evaluate(cfg, detector, cada, content, test_set, device, started)


def say_what_runs(cfg: Config, detector: nn.Module, device: torch.device, train_set: list[Sample],
                  test_set: list[Sample]) -> None:
    """What is about to happen, on standard error."""
    classes = len({s.cls for s in train_set})
    print(f"{len(train_set)} training and {len(test_set)} test images of {classes} classes; "
          f"device {device}; output in {cfg.out}", file=sys.stderr)
    if detector.teacher.random:
        print(f"teacher: {cfg.teacher} with RANDOM weights (seed {cfg.seed}): this shows that the "
              "method works, its numbers are not the paper's", file=sys.stderr)


def train_detector(cfg: Config, detector: nn.Module, source: FeatureCache | Images, n: int,
                   device: torch.device, content: dict | None) -> dict:
    """The training loop. Returns the content of a checkpoint. Raises UserError on a NaN loss.

    source: what this process trains on, of n images in all (not needed here: --iters counts steps).
    Only the student learns: the teacher's features were computed without gradients, and its
    BatchNorm stays in eval mode. The student's BatchNorm learns its statistics here. There is no
    validation and no best epoch, which could only be chosen on test images: the last step counts.
    """
    student, (rank, count) = detector.student, process()
    if count > 1 and device.type == "cuda":  # PyTorch's SyncBatchNorm has no CPU kernels, so there
        nn.SyncBatchNorm.convert_sync_batchnorm(student)  # each process normalises its own batch
    # Optimiser and schedule: [author], written for a sibling model.
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr, weight_decay=1e-5, amsgrad=True,
                                  fused=True)  # one pass over the memory: 3 x faster on a CPU
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.8 * cfg.iters)], gamma=0.2)
    step = 0
    if content is not None:
        optimizer.load_state_dict(content["optimizer"])
        schedule.load_state_dict(content["schedule"])
        set_random_states(content["random"])
        step = content["step"]
    detector.train()
    engine = data_parallel(detector)
    batches = shuffled(len(source), cfg.batch_size // count, cfg.iters, cfg.seed, rank)[step:]
    bar = progress(feature_batches(source, batches, detector.teacher, device, cfg.workers),
                   "training", total=cfg.iters, initial=step)
    save_every = max(1, cfg.iters // 10)

    teacher = {"identity": detector.teacher.identity(),
               "state": detector.teacher.state_dict() if detector.teacher.random else None}

    def state() -> dict:
        return {"detector": NAME, "config": asdict(cfg), "step": step,
                "student": student.state_dict(), "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(), "random": random_states(), "teacher": teacher}

    with polite_interrupt() as interrupted:
        for features in bar:
            loss = engine(features)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            due = step % save_every == 0 and step < cfg.iters
            if due or step % 20 == 0 or step == cfg.iters:  # seldom: item() waits for the GPU
                value = sum_over_processes(loss.detach()).item() / count
                if not math.isfinite(value):
                    raise UserError(f"the loss is {value} at step {step}; lower --lr {cfg.lr}")
                bar.set_postfix(loss=f"{value:.4f}")
            if (due or interrupted) and rank == 0:
                save_checkpoint(Path(cfg.out) / "checkpoint.pt", state())
            if interrupted and rank == 0:  # whom all others will miss in the next step
                raise KeyboardInterrupt(f"interrupted at step {step}; go on with --resume "
                                        f"--out {cfg.out}")
    return state()


def class_statistics(maps: Tensor, classes: list[str]) -> dict[str, list[float]]:
    """{class: [u_c, gamma_c]}, class means over training images: the label oracle. [ours] D7"""
    statistics, names = map_statistics(maps), np.array(classes)
    return {c: statistics[names == c].mean(0).tolist() for c in sorted(set(classes))}


def evaluate(cfg: Config, detector: nn.Module, cada: CADA | None, content: dict,
             test_set: list[Sample], device: torch.device, started: float) -> None:
    """Score the test set raw, aligned by CADA and by the label oracle; write and print it all."""
    out, labels = Path(cfg.out), np.array([s.label for s in test_set])
    classes = np.array([s.cls for s in test_set])
    images = Images(share(test_set), detector.preprocess)
    encoded = (detector.teacher(x) for x in image_batches(images, cfg, device))
    features, maps = describe_all(detector, encoded)
    if maps is None:
        return  # rank 0 has them all, and does the rest
    masks = load_masks(test_set, detector.preprocess.size)
    maps = smooth(maps)  # once for all three: aligning commutes with blurring
    u, gamma = cada.predict(features)
    statistics = {"raw": (torch.zeros_like(u), torch.ones_like(u)), "cada": (u, gamma)}
    oracle = content["cada"]["oracle"]
    unknown = set(classes) - set(oracle)
    if not unknown:
        statistics["oracle"] = torch.tensor([oracle[c] for c in classes]).T  # (2, N)
    aligned = {name: normalise(maps, *s) for name, s in statistics.items()}
    scores = {name: image_score(m).numpy() for name, m in aligned.items()}
    results = {name: summarise(scores[name], labels, classes, aligned[name], masks, device)
               for name in statistics}
    threshold, raw_threshold = content["cada"]["threshold"], content["threshold"]
    anomalous = scores["cada"] > threshold
    write_scores(out / "scores.csv", test_set,
                 scores | {"u": u.numpy(), "gamma": gamma.numpy(), "anomalous": anomalous})
    layers = {"raw map": (maps, 0, 2 * raw_threshold, "inferno", "raw"),
              "aligned": (aligned["cada"], 0, 2 * threshold, "inferno", "aligned")}
    plot_rows(out / "heatmaps.png", "Anomaly maps, raw and aligned by CADA", [
        row for label in (0, 1) for row in picture_rows(test_set, masks, layers, label)])
    panels = {"raw": (scores["raw"], raw_threshold), "cada": (scores["cada"], threshold)}
    plot_distributions(out / "distributions.png", "Scores of normal and anomalous test images", {
        f"{name}: pooled I-AUROC {100 * results[name]['pooled']['I-AUROC']:.1f} %": panel
        for name, panel in panels.items()}, labels, classes)
    write_json(out / "metrics.json", {
        "script": "cada", "detector": content["detector"], "config": asdict(cfg),
        "versions": versions(),
        "seconds": round(time.time() - started, 1), "threshold": threshold, "results": results})
    print(table(results))
    if masks is None:
        print("no masks in this data set: image metrics only")
    if unknown:
        print(f"no oracle rows: class {min(unknown)} was not in the training set")
    print(f"wrote metrics.json, scores.csv, heatmaps.png and distributions.png to {out}")
    print(threshold_line(threshold, cfg.quantile, anomalous, labels))


def predict(base: types.ModuleType, given: dict, paths: list[str]) -> None:
    """Print one JSON line an image and write an overlay of its own size; no data set is needed."""
    cfg, detector, cada, content, device = load_trained(base, given)
    files, threshold = find_images(paths), content["cada"]["threshold"]
    batches = image_batches(Images(files, detector.preprocess), cfg, device)
    for i, x in enumerate(batches):
        features, maps = describe_all(detector, [detector.teacher(x)])
        statistics = cada.predict(features)
        maps = normalise(smooth(maps), *statistics)
        for sample, score, amap, u, gamma in zip(files[i * cfg.batch_size:],
                                                 image_score(maps).tolist(), maps,
                                                 *(t.tolist() for t in statistics)):
            target = overlay_path(Path(cfg.out) / "predict", sample.path)
            write_overlay(target, load_image(sample.path), amap, full=2 * threshold)
            print(json.dumps({"path": str(sample.path), "score": score, "threshold": threshold,
                              "anomalous": score > threshold, "u": u, "gamma": gamma,
                              "overlay": str(target)}))


def load_trained(base: types.ModuleType, given: dict) -> tuple:
    """Settings, detector, CADA, checkpoint and device for eval and predict."""
    path = checkpoint_path(given)
    content = load_checkpoint(path, base.NAME)
    if "threshold" not in content:
        raise UserError(f"--checkpoint {path}: its training stopped at step {content['step']}; "
                        "finish it with --resume")
    if "cada" not in content:
        raise UserError(f"--checkpoint {path}: a detector without CADA; python cada.py --base "
                        f"{base.NAME} --checkpoint {path} --out FOLDER adds it")
    cfg = base.Config(**stored_config(content, given, base.MAY_DIFFER + ("data", "batch_size"),
                                      path))
    detector, device = base.build(cfg, content)
    classes, in_features = content["cada"]["state"]["centres"].shape
    cada = CADA(in_features, classes)
    cada.load_state_dict(content["cada"]["state"])
    return cfg, detector, cada, content, device


def choose_base(argv: list[str] | None) -> tuple[types.ModuleType, Parser]:
    """The module whose detector CADA aligns, this one or cnc.py, and the parser that knows --base.

    Both have Config, configure, build, say_what_runs, fit_detector, NAME and MAY_DIFFER. It is read
    before all other flags, since those are the module's.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--base", choices=("revdist", "cnc"), default="revdist",
                        help="detector to align; with cnc the other flags are cnc.py's, but --out "
                        "is runs/cada by default, and --checkpoint may name a trained CNC to start "
                        "from (default: revdist)")
    if parser.parse_known_args(argv)[0].base == "revdist":
        return sys.modules[__name__], parser
    try:
        import cnc
    except ImportError as e:
        raise UserError(f"--base cnc: {e}; put cnc.py beside cada.py and install requirements.txt")
    cnc.UserError = UserError  # for main(), a mistake is a mistake wherever it was noticed
    return cnc, parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 after a mistake of the user's, told in one line, 130
    after Ctrl-C."""
    started = time.time()
    try:
        with joined_processes():
            base, parser = choose_base(argv)
            command, paths, given = parse_args(argv, base.Config, __doc__, parser)
            del given["base"]
            if command == "train":
                train(base, given, started)
            elif command == "predict":
                predict(base, given, paths)
            else:
                cfg, *parts, device = load_trained(base, given)
                test_set = read_dataset(Path(cfg.data), test_only=True)[1]
                with output_folder(Path(cfg.out)):
                    evaluate(cfg, *parts, test_set, device, started)
        return 0
    except (Exception, KeyboardInterrupt) as e:
        print(f"cada.py: error: {one_line(e)}", file=sys.stderr)
        return 130 if isinstance(e, KeyboardInterrupt) else 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a class name that a Windows console lacks
    sys.exit(main())
