r"""CNC: language keeps the decoder from reproducing defects (AAAI 2025, arXiv:2501.00346).

Wang, Wang, Bai, Lim, Xiao. CNC: Cross-modal Normality Constraint for Unsupervised Multi-class
Anomaly Detection, 2025. A reconstruction from public facts; every choice says where it comes from:
[paper] stated there, [port] seen only in a third-party port, [ours] Dn a reading of ours, the n-th
in the README's list of departures.

The idea. A frozen CLIP describes the image, and a decoder that has seen normal images only must
reproduce the description; where it fails, the image is anomalous. But many classes teach the
decoder so many kinds of patches that it reproduces anomalies too ("over-generalisation"). CNC
guides the decoded features towards learnable prompts that mean "normal", whatever the class, and
sends each patch through 2 of 5 experts, so that patches of different kinds disturb each other less.

    image (B, 3, S, S)               "[V1]..[V12] object." "[W1]..[W12] damaged object." per tap
      |                                                     |
    Teacher, frozen CLIP image tower             PromptLearner, frozen CLIP text tower
      |                                                     |
    e1, e2, e3 (B, 1+N, C), from 3 blocks        t_n, t_a (taps, 2, D), unit vectors
      |                                                     |
    Student: fuse -> (B, 1+N, C)                            |
      |      GatedMoE, 2 of 5 experts a token               |
      |      decode -> d1, d2, d3 (B, 1+N, C)               |
      |                                                     |
    P(e), P(d): CLIP's joint space (B, 1+N, D) <--- promote: v* = v + psi(v) t_n
      |                                        <--- constrain: decoded CLS nearer to t_n than to t_a
    M = mean over taps of 1 - cos(e*, d*) -> (B, S, S) -> blur -> image score (B,)

Sections between `shared` banners stand in both scripts letter for letter; data, map and metrics
apart, they are plumbing that a first reading can skip.

paper                                          here
  frozen CLIP [paper], tapped at thirds [port]   Teacher
  class-agnostic learnable prompts [paper]       PromptLearner
  gated mixture-of-experts [paper]               GatedMoE
  fusion, decoder [port]                         Student
  feature-level normality promotion [paper]      promote; along t_n: [ours] D13
  cross-modal normality constraint [paper]       CNC.constraint; form: [ours] D10
  theta = 5 [paper]                              CNC.forward; warm-up: [ours] D9
  tau = 0.001 [paper]                            CNC.constraint; its role: [ours] D10
  distillation by cosine [paper]                 CNC.distance; patch by patch: [ours] D12
  joint space                                    Teacher.joint; frozen, all taps: [ours] D11
  anomaly map M [paper]                          CNC.describe; image_score: [ours] D16

    python cnc.py                                      train and evaluate; without data/mvtec and
                                                       data/visa on the small set in data/demo
    python cnc.py --data DIR                           on MVTec AD, VisA, or a tree of your own
    python cnc.py --no-moe --no-fnp --no-constraint    plain reverse distillation, in joint space
    python cnc.py eval --checkpoint FILE               the same numbers again
    python cnc.py predict --checkpoint FILE PATH ...   score images, write heat maps
    torchrun --nproc-per-node=N cnc.py ...             the same on N GPUs
    python cada.py --base cnc                          one threshold for all classes (cada.py)

Measured on the demo set: tiny random CLIP, about 2 minutes a run on 2 CPU cores, seeds 0-2, in %,
class-mean I-AUROC / P-AUROC: 90.7 +- 1.9 / 93.7 +- 0.3, plain reverse distillation 91.2 +- 1.2 /
94.3 +- 0.4; pooled I-AUROC 88.5 +- 1.5 against 86.3 +- 1.0. A random teacher's text means nothing:
this proves the machinery, not the paper's gain. MVTec AD, VisA, trained CLIP weights and a GPU: not
run here. ELPV and all that was tried: data/RESULTS.md.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import textwrap
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
import open_clip
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from filelock import FileLock, Timeout
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.utils.data import DataLoader, Dataset
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
    """Every flag. The defaults are the published settings for MVTec AD [paper] where there are any;
    VisA differs in one, see VISA."""

    data: str = option(None, "data set folder; default: data/mvtec, else data/visa, else data/demo")
    out: str = option("runs/cnc", "folder for everything that is written")
    seed: int = option(0, "seed of weights, batches and dropout")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    teacher: str = option("ViT-L-14-336", "frozen CLIP: an open_clip ViT [paper], or tiny, a small "
                          "one built here [ours] D3")
    weights: str = option("openai", "its weights: open_clip tag, local file, or none (random) "
                          "[paper]")
    image_size: int = option(None, "sides of the square that images are squashed to, in pixels, a "
                             "multiple of the teacher's patch; default: what the teacher was made "
                             "for, 336 [paper]")
    taps: str = option(None, "blocks of the teacher to reproduce, for instance 8,16,24; default: "
                       "at one third, two thirds and all of its depth [port]")
    batch_size: int = option(8, "images a training step [paper]")
    epochs: int = option(250, "passes over the training images [paper]; 200 on VisA (raw "
                         "archive)")
    lr: float = option(1e-3, "Adam learning rate [paper]")
    clip: float = option(1.0, "gradients are scaled down to this norm; 0: never [ours] D15")
    experts: int = option(5, "experts of the gated mixture [paper]")
    top_k: int = option(2, "experts that each token uses [paper]")
    theta: int = option(5, "epochs in which the constraint teaches the prompts, not yet the "
                        "decoder [paper], meaning [ours] D9; the distillation runs from the "
                        "start")
    tau: float = option(0.001, "temperature of the softmax over image-text cosines [paper]")
    shared_prompts: bool = option(False, "one context for both sentences, starting as real words: "
                                  "keeps the meaning of \"damaged\" [ours] D17")
    no_moe: bool = option(False, "one expert instead of the gated mixture")
    no_fnp: bool = option(False, "no feature-level normality promotion")
    no_constraint: bool = option(False, "do not guide the decoded features towards normal text "
                                 "(the prompts still learn if the promotion needs them) "
                                "[ours] D9")
    quantile: float = option(0.99, "share of normal training scores below the threshold "
                             "[ours] D1")
    cache: str = option("auto", "teacher features in memory, in a temporary file, or computed "
                        "anew; auto: ram if half of the free memory holds them [ours] D2",
                        ("auto", "ram", "disk", "off"))
    checkpoint: str = option(None, "checkpoint to read (eval, predict, --resume); default: "
                             "checkpoint.pt in --out")
    resume: bool = option(False, "go on from the checkpoint of an interrupted training")
    workers: int = option(4, "processes that read images, at most one a CPU core")

    def __post_init__(self) -> None:
        """Raise UserError for a value that cannot work."""
        for name in ("epochs", "batch_size", "lr", "tau", "experts"):
            if not getattr(self, name) > 0:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {getattr(self, name)}: must be above 0")
        for name in ("seed", "workers", "theta", "clip"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image-size {self.image_size}: must be a positive multiple of the "
                            "teacher's patch")
        if not 1 <= self.top_k <= self.experts:
            raise UserError(f"--top-k {self.top_k}: must be between 1 and the number of experts "
                            f"(--experts {self.experts})")
        if not 0 < self.quantile <= 1:
            raise UserError(f"--quantile {self.quantile}: must be above 0 and at most 1")


# What replaces the defaults on the demo set, so that two CPU cores do it in minutes. [ours] D3
DEMO = {"teacher": "tiny", "weights": "none", "epochs": 30, "workers": 0}
VISA = {"epochs": 200}  # [paper]
# Flags that may differ between a checkpoint and the command that reads it.
MAY_DIFFER = ("out", "device", "cache", "checkpoint", "resume", "workers")
NAME = "cnc"  # of the detector, in checkpoints


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


# ---- frozen teacher: CLIP ------------------------------------------------------------------------
# A CLIP that needs no download: random weights from a seed, small enough for a CPU. [ours] D3
TINY = {"embed_dim": 192,
        "vision_cfg": {"image_size": 128, "patch_size": 16, "width": 192, "layers": 6},
        "text_cfg": {"context_length": 32, "width": 128, "heads": 2, "layers": 3}}

KNOWN = "use for instance ViT-B-32, ViT-B-16, ViT-L-14, ViT-L-14-336"
NO_PLAIN_VIT = ("--teacher {}: not a plain ViT with a CLS token and a text tower of CLIP's kind "
                f"(CNC reads patch tokens, CLS and prompts); {KNOWN}")


def load_clip(name: str, weights: str, image_size: int | None) -> tuple[nn.Module, Callable]:
    """A CLIP and its tokenizer: built here (tiny) or by open_clip, random or with --weights.

    Raises UserError for an unknown name and for weights that cannot be had or do not fit.
    """
    remedy = "give a local file with --weights FILE, or --weights none for a random teacher"
    if name != "tiny" and name not in open_clip.list_models():
        raise UserError(f"--teacher {name}: unknown; use tiny or a ViT of open_clip's: {KNOWN}")
    if name != "tiny":  # ask before a download of gigabytes
        vision = open_clip.get_model_config(name)["vision_cfg"]
        if "timm_model_name" in vision or not isinstance(vision.get("layers", 12), int):
            raise UserError(NO_PLAIN_VIT.format(name))
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights != "none" and weights not in tags and not Path(weights).is_file():
        known = f"none of {', '.join(tags)}" if tags else f"{name} has no published weights"
        raise UserError(f"--weights {weights}: no such file, and {known}; {remedy}")
    try:
        logging.disable(logging.CRITICAL)  # open_clip logs what we report ourselves
        if name == "tiny":
            vision = TINY["vision_cfg"] | ({"image_size": image_size} if image_size else {})
            clip = open_clip.CLIP(**TINY | {"vision_cfg": vision})
            clip.visual.positional_embedding.data *= 0.3  # drawn at full size, it outweighs texture
            nn.init.orthogonal_(clip.visual.proj)  # the joint space keeps cosines
            if weights != "none":
                open_clip.load_checkpoint(clip, weights)
            return clip, open_clip.SimpleTokenizer(
                context_length=TINY["text_cfg"]["context_length"])
        clip = open_clip.create_model(
            name, None if weights == "none" else weights, force_image_size=image_size,
            force_quick_gelu=quick_gelu(name, weights), pretrained_text=False)
        return clip, open_clip.get_tokenizer(name)
    except MemoryError:
        raise
    except Exception as e:  # a failed download, a broken file, a missing package: many kinds
        reason = textwrap.shorten(str(e), 300, placeholder=" ...")
        if weights == "none":
            raise UserError(f"--teacher {name}: cannot be built here ({reason}); {KNOWN}")
        raise UserError(f"--weights {weights}: cannot load it into {name} ({reason}); {remedy}")
    finally:
        logging.disable(logging.NOTSET)


def quick_gelu(name: str, weights: str) -> bool:
    """Whether the weights were trained with QuickGELU, x * sigmoid(1.702 x), as OpenAI's were.

    Plain GELU in its place would run, and be a little wrong in every block. open_clip knows it of
    each tag. Of a file nobody knows; it counts as QuickGELU when all published weights of that
    name are. Else the name decides: ViT-B-32-quickgelu for a file of OpenAI's ViT-B-32.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    tags = [weights] if weights in tags else tags
    return bool(tags) and all(open_clip.get_pretrained_cfg(name, t).get("quick_gelu") for t in tags)


def parse_taps(text: str | None, depth: int) -> list[int]:
    """--taps as numbers of blocks, 1 is the first; by default at thirds of the depth. [port]"""
    if text is None:
        return [round(depth * i / 3) for i in (1, 2, 3)]
    try:
        taps = [int(t) for t in text.split(",")]
    except ValueError:
        taps = [0]
    if taps != sorted(set(taps)) or taps[0] < 1 or taps[-1] > depth:
        raise UserError(f"--taps {text}: must be numbers of blocks between 1 and {depth}, rising, "
                        "separated by commas")
    return taps


class Teacher(nn.Module):
    """CLIP, both towers: no gradients into its weights, always in eval mode. [paper]

    forward: (B, 3, S, S) -> for each tap (B, 1 + N, C) float16: the CLS token, then the patches row
    by row. Blocks after the last tap are not run. Half precision always, cached or not, so that
    --cache changes the time and nothing else.
    Raises UserError for a CLIP that is not a plain ViT with a CLS token, and for wrong taps.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.random = cfg.weights == "none"
        with torch.random.fork_rng(devices=[]):  # a seed's teacher is the same whatever ran before
            torch.manual_seed(cfg.seed)
            self.clip, self.tokenizer = load_clip(cfg.teacher, cfg.weights, cfg.image_size)
        visual = self.clip.visual
        if (getattr(visual, "attn_pool", True) is not None or visual.pool_type != "tok"
                or not isinstance(self.tokenizer, open_clip.SimpleTokenizer)
                or not hasattr(getattr(self.clip, "text", self.clip), "token_embedding")):
            raise UserError(NO_PLAIN_VIT.format(cfg.teacher))
        (side, width), (patch, _) = visual.image_size, visual.patch_size
        if side != width or side % patch:
            raise UserError(f"--image-size {side}: {cfg.teacher} takes squares whose side is a "
                            f"multiple of its patch, {patch}")
        self.taps = parse_taps(cfg.taps, len(visual.transformer.resblocks))
        self.grid, self.width = side // patch, visual.class_embedding.shape[0]
        stored = getattr(visual, "preprocess_cfg", {})  # a tag's own; CLIP's for all others
        self.preprocess = Preprocess(
            side, tuple(stored.get("mean", open_clip.OPENAI_DATASET_MEAN)),
            tuple(stored.get("std", open_clip.OPENAI_DATASET_STD)),
            Image.BILINEAR if stored.get("interpolation") == "bilinear" else Image.BICUBIC)
        if self.random:
            self.register_buffer("mean", torch.zeros(len(self.taps), 1, self.width))
            self.register_buffer("whiten", torch.eye(self.width).repeat(len(self.taps), 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> nn.Module:
        """Stay in eval mode whatever the parent does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Tensor]:
        if x.shape[1:] != (3, self.preprocess.size, self.preprocess.size):
            raise ValueError(f"expected images (B, 3, {self.preprocess.size}, "
                             f"{self.preprocess.size}), got {tuple(x.shape)}")
        with autocast(x.device, torch.float16):
            found = self.clip.visual.forward_intermediates(
                x, indices=[t - 1 for t in self.taps], stop_early=True, intermediates_only=True,
                output_fmt="NLC", output_extra_tokens=True)
        tokens = [torch.cat(pair, dim=1) for pair in zip(
            found["image_intermediates_prefix"], found["image_intermediates"])]
        if self.random:
            tokens = [(F.layer_norm(t.float(), (self.width,)) - mean) @ whiten
                      for t, mean, whiten in zip(tokens, self.mean, self.whiten)]
        return [t.half() for t in tokens]

    @torch.no_grad()
    def estimate_statistics(self, batches: Iterable) -> None:
        """Give a random teacher the mean and covariance of the training images' tokens, tap by tap:
        from now on it answers with whitened ones. [ours] D3

        A random network says little more than the mean colour of a patch: that one direction drowns
        all others in a cosine, and a decoder has learned it in no time. Whitening brings texture up
        to the same size. The tokens of a trained CLIP are left as they are.
        """
        n, total, outer = 0, 0, 0
        for x in batches:
            tokens = torch.stack(self(x)).flatten(1, 2).cpu().double()  # (taps, B * (1 + N), C)
            n, total = n + tokens.shape[1], total + tokens.sum(1, keepdim=True)
            outer = outer + tokens.mT @ tokens
        mean = total / n
        values, vectors = torch.linalg.eigh(outer / n - mean.mT @ mean)
        largest = values[:, None, -1:]  # eigh sorts them; a thousandth of it keeps noise small
        whiten = vectors * (values[:, None] / largest + 1e-3).rsqrt() @ vectors.mT
        self.mean.copy_(mean)
        self.whiten.copy_(whiten)

    def plain(self, features: list[Tensor]) -> list[Tensor]:
        """Undo the whitening: [(B, 1 + N, C)] -> the same, layer-normalised, less a mean.

        Whitening brings out what tells patches apart, at the cost of what tells classes apart.
        [ours] D18
        """
        if not self.random:
            return features
        return [f @ torch.linalg.inv(whiten) for f, whiten in zip(features, self.whiten)]

    def joint(self, tokens: Tensor) -> Tensor:
        """P(f): tokens of any tap (..., C) -> unit vectors in the space shared with text (..., D).

        CLIP's own frozen head, though it was made for the CLS of the last block [ours] D11. A
        learned head under a cosine loss may collapse: mapping all to one vector makes it zero.
        """
        return F.normalize(self.clip.visual.ln_post(tokens) @ self.clip.visual.proj, dim=-1)

    def identity(self) -> str:
        """A hash of the weights: a checkpoint fits only the teacher that it was trained with."""
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


# ---- class-agnostic prompts ----------------------------------------------------------------------
class PromptLearner(nn.Module):
    """Two learnable sentences for each tap, the same for all classes: no class name enters.
    [paper] Form: [port]

        normal    [V1] ... [V12] object.
        abnormal  [W1] ... [W12] damaged object.

    .ctx (taps, 2, n_ctx, dim) holds the V and W, vectors in the place of word embeddings, drawn
    from N(0, 0.02) [port]. Through the frozen text tower they become forward() -> (taps, 2, D),
    unit vectors [t_n, t_a].
    """

    SENTENCES = ("object.", "damaged object.")
    WORDS = "a photo of a"

    def __init__(self, teacher: Teacher, n_ctx: int = 12, shared: bool = False) -> None:
        """shared: one context V = W of four tokens, .ctx (taps, 1, 4, dim), which starts as WORDS,
        so that nothing but the word "damaged" tells t_a from t_n. A one-class loss lets two free
        contexts drift to where the difference says nothing about defects. [ours] D17
        """
        super().__init__()
        clip, n_ctx = teacher.clip, 4 if shared else n_ctx
        blanks = "x " * n_ctx  # one token each; its embedding is replaced
        self.register_buffer("ids", teacher.tokenizer([blanks + s for s in self.SENTENCES]),
                             persistent=False)
        self.embedding = (getattr(clip, "text", clip).token_embedding,)  # a tuple hides the frozen
        self.encode_text = clip.encode_text  # tower from state_dict() and parameters()
        embed, taps = self.embedding[0], len(teacher.taps)
        if shared:
            words = embed(teacher.tokenizer([self.WORDS]))[0, 1:1 + n_ctx]
            self.ctx = nn.Parameter(words.detach().repeat(taps, 1, 1, 1))
        else:
            self.ctx = nn.Parameter(0.02 * torch.randn(taps, 2, n_ctx, embed.embedding_dim))

    def forward(self) -> Tensor:
        taps, n_ctx = self.ctx.shape[0], self.ctx.shape[2]

        def insert(module: nn.Module, args: tuple, words: Tensor) -> Tensor:
            # words: (2 * taps, length, dim), start, blanks, sentence, end
            ctx = self.ctx.expand(-1, 2, -1, -1).flatten(0, 1).to(words.dtype)
            return torch.cat([words[:, :1], ctx, words[:, 1 + n_ctx:]], dim=1)

        # A hook, so that encode_text is open_clip's own: mask, pooling and all.
        hook = self.embedding[0].register_forward_hook(insert)
        try:
            text = self.encode_text(self.ids.repeat(taps, 1))
        finally:
            hook.remove()
        return F.normalize(text.float().unflatten(0, (taps, 2)), dim=-1)


# ---- student: fusion, mixture of experts, decoder ------------------------------------------------
def expert(dim: int) -> nn.Sequential:
    """(..., dim) -> (..., dim). [port]"""
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))


class GatedMoE(nn.Module):
    """Each token goes through the top_k of num_experts that the gate scores highest. [paper]

    forward: (B, N, dim) -> y (B, N, dim) and the balance loss, a scalar.
    y = sum over the chosen experts k of w_k expert_k(x), w = softmax of their gate scores. [port]
    """

    def __init__(self, dim: int, num_experts: int = 5, top_k: int = 2) -> None:
        super().__init__()
        self.gate, self.top_k = nn.Linear(dim, num_experts), top_k
        self.experts = nn.ModuleList(expert(dim) for _ in range(num_experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, dim) -> weights (T, K), chosen experts (T, K), probabilities of all (T, experts); T
        tokens, K = top_k."""
        with torch.autocast(x.device.type, enabled=False):  # bf16 would change who is chosen
            logits = self.gate(x.float())
        top, chosen = logits.topk(self.top_k, dim=-1)
        return top.softmax(-1), chosen, logits.softmax(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)  # (B, N, dim) -> (B*N, dim)
        weights, chosen, probabilities = self.route(tokens)
        # Sorted by expert, each expert's tokens are one block: it sees its own tokens only, and the
        # host waits for the GPU once (tolist), not once an expert.
        order = chosen.flatten().argsort(stable=True)  # (T*K,)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        token = order // self.top_k
        blocks = tokens[token].split(counts)
        answers = torch.cat([e(block) for e, block in zip(self.experts, blocks)]).float()
        y = torch.zeros_like(tokens, dtype=torch.float32)
        y = y.index_add(0, token, weights.flatten()[order, None] * answers)
        # (std / mean)^2 of the experts' summed probabilities: 0 when all are equally probable.
        # Without it the gate may settle on two experts that get all tokens and gradients. [port]
        load = probabilities.sum(0)
        if self.training:
            load = sum_over_processes(load)
        return y.view(x.shape), load.var(correction=0) / load.mean() ** 2


class Student(nn.Module):
    """What CNC trains beside the prompts: fusion, experts, decoder.

    forward: the teacher's taps [(B, 1 + N, C), ...], float32 -> the same shapes, reproduced, and
    the balance loss. Fusion with dropout 0.1, and a decoder of one block a tap that runs from deep
    to shallow: its first block reproduces the last tap. [port]
    """

    def __init__(self, taps: int, dim: int, experts: int, top_k: int) -> None:
        """experts = 0: one expert of the same width for all tokens, no gate."""
        super().__init__()
        self.fuse = nn.Sequential(nn.Linear(taps * dim, dim), nn.LayerNorm(dim), nn.Dropout(0.1))
        self.moe = GatedMoE(dim, experts, top_k) if experts else expert(dim)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, max(1, dim // 64), 4 * dim, dropout=0.0,
                                       activation="gelu", batch_first=True, norm_first=True)
            for _ in range(taps))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        x, balance = self.fuse(torch.cat(features, dim=-1)), features[0].new_zeros(())
        if isinstance(self.moe, GatedMoE):
            x, balance = self.moe(x)
        else:
            x = self.moe(x).float()  # as the mixture does: the ablation removes nothing else
        decoded = []
        for block in self.blocks:
            x = block(x)
            decoded.insert(0, x)
        return decoded, balance


# ---- CNC -----------------------------------------------------------------------------------------
def promote(v: Tensor, t_normal: Tensor, t_abnormal: Tensor) -> Tensor:
    """Feature-level normality promotion: v* = v + psi t_n, psi = (1 + tanh(<v,t_n> - <v,t_a>)) / 2.

    v: unit vectors (..., D); t_normal, t_abnormal: (D,). Returns (..., D), not normalised.
    It is meant so: a normal patch gains the normal direction both encoded and decoded, an abnormal
    one only decoded, as the decoder knows nothing but normal patches; so the two move apart. That
    it exists is [paper], psi is [port], the direction t_n [ours] D13: psi v instead is parallel to
    v, and no cosine would notice. A doubt: without a temperature the tanh sees differences of
    mostly a tenth, so psi stays near 1/2 (0.50 +- 0.05 on the demo) and all patches gain alike.
    """
    psi = (1 + torch.tanh(v @ t_normal - v @ t_abnormal)) / 2
    return v + psi[..., None] * t_normal


class CNC(nn.Module):
    """Reverse distillation with a cross-modal normality constraint.

    This is all that CADA and the shared code need of a detector: `preprocess` for images, `teacher`
    for frozen features of them; called, it gives the loss on these, and `describe` turns them into
    pooled features and a raw anomaly map.
    """

    CONSTRAINT_WEIGHT, BALANCE_WEIGHT = 0.1, 0.01  # w_cm [ours] D10, [ours] D14

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.teacher = Teacher(cfg)
        self.preprocess = self.teacher.preprocess
        self.prompts = PromptLearner(self.teacher, shared=cfg.shared_prompts)
        self.student = Student(len(self.teacher.taps), self.teacher.width,
                               0 if cfg.no_moe else cfg.experts, cfg.top_k)
        self.tau, self.fnp, self.guided = cfg.tau, not cfg.no_fnp, not cfg.no_constraint
        self.text = None

    def decode(self, features: list[Tensor]) -> tuple[list, list, Tensor]:
        """Teacher features -> encoded and decoded tokens, float32, and the balance loss."""
        encoded = [f.float() for f in features]
        with autocast(features[0].device, torch.bfloat16):
            decoded, balance = self.student(encoded)
        return encoded, [d.float() for d in decoded], balance

    def train(self, mode: bool = True) -> nn.Module:
        """Forget the cached text features: call train() or eval() after changing weights or device.
        """
        self.text = None
        return super().train(mode)

    def text_features(self, learning: bool) -> Tensor:
        """[t_n, t_a] of each tap, (taps, 2, D): with gradient while the prompts learn; afterwards
        computed once, since neither they nor the text tower change any more."""
        if learning:
            self.text = None
            return self.prompts()
        if self.text is None:
            with torch.no_grad():
                self.text = self.prompts()
        return self.text

    def distance(self, encoded: list[Tensor], decoded: list[Tensor], text: Tensor) -> Tensor:
        """1 - cos(e*, d*) of each patch, in the joint space and promoted: lists of (B, 1 + N, C) ->
        (taps, B, N) in 0..2. RD with cosine is [paper], patch by patch [ours] D12."""
        maps = []
        for e, d, (t_normal, t_abnormal) in zip(encoded, decoded, text):
            e, d = self.teacher.joint(e[:, 1:]), self.teacher.joint(d[:, 1:])
            if self.fnp:
                e, d = promote(e, t_normal, t_abnormal), promote(d, t_normal, t_abnormal)
            maps.append(1 - F.cosine_similarity(e, d, dim=-1))
        return torch.stack(maps)

    def constraint(self, tokens: list[Tensor], text: Tensor) -> Tensor:
        """Cross entropy of softmax(<P(cls), [t_n, t_a]> / tau) against "normal", mean over taps.

        tokens: lists of (B, 1 + N, C), text (taps, 2, D). [paper] target, [ours] D10 form.
        At tau = 0.001 a difference of 0.01 in cosine is one of 10 in logit: the loss saturates
        as soon as t_a is a little farther off than t_n, and is over. Hence float32, and for the
        last product no matmul, which bf16 and TF32 would round to three digits.
        """
        losses = []
        for f, t in zip(tokens, text):
            cls = self.teacher.joint(f[:, :1])  # (B, 1, D)
            logits = F.cosine_similarity(cls, t, dim=-1) / self.tau  # (B, 2)
            losses.append(F.cross_entropy(logits, logits.new_zeros(len(f), dtype=torch.long)))
        return torch.stack(losses).mean()

    def forward(self, features: list[Tensor], warm_up: bool = False) -> Tensor:
        """The loss: L = L_distillation + 0.1 L_constraint + 0.01 L_balance, a scalar.

        In the warm-up the constraint reads *encoded* CLS tokens and teaches the prompts what normal
        images look like; after it, *decoded* ones and teaches the decoder, prompts fixed. [ours] D9
        """
        encoded, decoded, balance = self.decode(features)
        learning = warm_up and (self.fnp or self.guided)
        text = self.text_features(learning)
        total = (self.distance(encoded, decoded, text.detach()).mean()
                 + self.BALANCE_WEIGHT * balance)
        if learning:
            total = total + self.CONSTRAINT_WEIGHT * self.constraint(encoded, text)
        elif self.guided and not warm_up:
            total = total + self.CONSTRAINT_WEIGHT * self.constraint(decoded, text)
        return total

    def describe(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Teacher features -> (pooled (B, 2 * taps * C), raw anomaly map (B, S, S) in 0..2).

        M = mean over taps of 1 - cos(e*, d*) of each patch, up-sampled; align_corners=False
        ([ours] D16): a token's value belongs to the centre of its patch. Pooled, mean and standard
        deviation over patches, is for CADA: frozen features of the whole image tell its class.
        [ours] D6
        """
        encoded, decoded, _ = self.decode(features)
        m = self.distance(encoded, decoded, self.text_features(False)).mean(0)  # (B, N)
        m = m.view(-1, 1, self.teacher.grid, self.teacher.grid)
        maps = F.interpolate(m, (self.preprocess.size,) * 2, mode="bilinear", align_corners=False)
        pooled = [t for f in self.teacher.plain(encoded) for t in torch.std_mean(f[:, 1:], dim=1)]
        return torch.cat(pooled, dim=1), maps[:, 0]

    def explain(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the figures show, patch by patch: the margins <P(f), t_n - t_a> of encoded and of
        decoded patches, (B, N) each, mean over taps; the gate's weights (B, N, experts) or None."""
        encoded, decoded, _ = self.decode(features)
        text = self.text_features(False)
        margins = [torch.stack([self.teacher.joint(f[:, 1:]) @ (t[0] - t[1])
                                for f, t in zip(tokens, text)]).mean(0)
                   for tokens in (encoded, decoded)]
        gate, moe = None, self.student.moe
        if isinstance(moe, GatedMoE):
            with autocast(features[0].device, torch.bfloat16):
                x = self.student.fuse(torch.cat(encoded, dim=-1))[:, 1:]
            weights, chosen, probabilities = moe.route(x.flatten(0, 1))
            gate = torch.zeros_like(probabilities).scatter(1, chosen, weights)
            gate = gate.view(*x.shape[:2], -1)
        return *margins, gate


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


# ---- figures of CNC's own ------------------------------------------------------------------------
# The rest of Okabe and Ito's colours: one an expert, again from the first if there are more.
EXPERT_COLOURS = (BLUE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", VERMILION, "#F0E442")


@torch.no_grad()
def look_inside(cfg: Config, detector: CNC, test_set: list[Sample], device: torch.device) -> tuple:
    """Run CNC.explain() on each class's middle defective and first eight good test images.

    Returns those images' indices, margins encoded and decoded (n, h, w), and the gate's weights
    (n, h, w, experts) or None, on the CPU.
    """
    rows = list(middle(test_set, 1).values())
    for cls in sorted({s.cls for s in test_set}):
        rows += [i for i, s in enumerate(test_set) if (s.cls, s.label) == (cls, 0)][:8]
    images = Images([test_set[i] for i in rows], detector.preprocess)
    parts = zip(*(detector.explain(detector.teacher(x))
                  for x in image_batches(images, cfg, device)))
    side = detector.teacher.grid
    return rows, *(None if part[0] is None else
                   torch.cat([t.float().cpu() for t in part]).unflatten(1, (side, side))
                   for part in parts)


def plot_experts(path: Path, samples: list[Sample], gate: Tensor) -> None:
    """How the gate's weight on the patches of each class's good samples is shared among the
    experts; the last row is their load. gate: (len(samples), h, w, experts)."""
    good, owner = np.array([s.label == 0 for s in samples]), np.array([s.cls for s in samples])
    classes = sorted(set(owner))
    shares = [gate[good & (owner == c)].mean((0, 1, 2)) for c in classes]  # NaN without good ones
    shares = torch.stack([*shares, gate[good].mean((0, 1, 2))]).numpy()
    figure = Figure(figsize=(1.5 + 1.3 * shares.shape[1], 1.5 + 0.5 * len(shares)),
                    layout="constrained")
    ax = figure.subplots()
    shown = ax.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        ax.text(column, row, "-" if math.isnan(share) else f"{100 * share:.0f}", ha="center",
                va="center", color="white" if share > 0.6 else "black", fontsize=12)
    ax.set_xticks(range(shares.shape[1]), [f"{k + 1}" for k in range(shares.shape[1])], fontsize=12)
    ax.set_yticks(range(len(shares)), [*classes, "all (load)"], fontsize=12, parse_math=False)
    ax.set_xlabel("expert", fontsize=12)
    ax.set_ylabel("class", fontsize=12)
    ax.set_title("Which experts take the patches of a class", fontsize=14)
    figure.colorbar(shown).set_label("share of the gate's weight, %", fontsize=11)
    save_figure(path, figure)


def plot_inside(cfg: Config, detector: CNC, test_set: list[Sample], masks: Tensor | None,
                maps: Tensor, threshold: float, device: torch.device) -> list[str]:
    """Draw heat maps and the figures of those parts that are on; return their file names."""
    out, figures = Path(cfg.out), ["heatmaps.png"]
    rows, encoded, decoded, gate = look_inside(cfg, detector, test_set, device)
    samples = [test_set[i] for i in rows]
    for name in ("experts.png", "text.png"):  # of an earlier run with other flags
        (out / name).unlink(missing_ok=True)
    layers = {"anomaly map": (maps, 0, 2 * threshold, "inferno", "1 - cos")}
    pictures = [row for label in (0, 1) for row in picture_rows(test_set, masks, layers, label)]
    if gate is not None:
        colours = ListedColormap([EXPERT_COLOURS[k % len(EXPERT_COLOURS)]
                                  for k in range(gate.shape[-1])])
        experts = {"expert": (gate.argmax(-1) + 1, 0.5, gate.shape[-1] + 0.5, colours, "expert")}
        pictures += picture_rows(samples, None, experts, 1)[1:]
        plot_experts(out / "experts.png", samples, gate)
        figures.append("experts.png")
    plot_rows(out / "heatmaps.png", "Anomaly maps, and the expert with the largest weight"
              if gate is not None else "Anomaly maps", pictures)
    if middle(samples, 1) and (detector.fnp or detector.guided):
        low, high = (f(torch.stack([encoded, decoded])).item() for f in (torch.min, torch.max))
        layers = {name: (m, low, high, "cividis", "<f, t_n - t_a>")
                  for name, m in (("encoded", encoded), ("decoded", decoded))}
        pictures = picture_rows(samples, None if masks is None else masks[rows], layers, 1)
        plot_rows(out / "text.png", "How much nearer to the normal than to the abnormal text",
                  pictures)
        figures.append("text.png")
    return figures


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
    if (root / "split_csv/1cls.csv").is_file():
        defaults = VISA
    return Config(**{**defaults, **given, "data": str(root.resolve())}), None


def build(cfg: Config, content: dict | None = None) -> tuple[CNC, torch.device]:
    """The detector on its device, with the weights of a checkpoint if one is given."""
    device = choose_device(cfg.device)
    torch.manual_seed(cfg.seed)
    detector = CNC(cfg)
    if content is not None:
        check_teacher(detector.teacher, content)
        detector.student.load_state_dict(content["student"])
        detector.prompts.load_state_dict(content["prompts"])
    return detector.to(device), device


def train(given: dict, started: float) -> None:
    """Train the detector, set the threshold from normal training scores, then evaluate once."""
    if "checkpoint" in given and "resume" not in given:
        raise UserError("--checkpoint is read by eval, predict and --resume; train writes to --out")
    cfg, content = configure(given, checkpoint_path(given) if "resume" in given else None)
    train_set, test_set = read_dataset(Path(cfg.data))
    detector, device = build(cfg, content)
    with output_folder(Path(cfg.out)) as out:
        say_what_runs(cfg, detector, device, train_set, test_set)
        content, _, maps = fit_detector(cfg, detector, train_set, device, content)
        if maps is not None:  # under torchrun: rank 0 alone
            content |= {"threshold": quantile(image_score(smooth(maps)), cfg.quantile)}
            save_checkpoint(out / "checkpoint.pt", content)
        del maps  # gigabytes, on a real set
        evaluate(cfg, detector, content, test_set, device, started)


def say_what_runs(cfg: Config, detector: nn.Module, device: torch.device, train_set: list[Sample],
                  test_set: list[Sample]) -> None:
    """What is about to happen, on standard error."""
    classes = len({s.cls for s in train_set})
    print(f"{len(train_set)} training and {len(test_set)} test images of {classes} classes; "
          f"device {device}; output in {cfg.out}", file=sys.stderr)
    print(f"teacher: {cfg.teacher}, blocks {', '.join(map(str, detector.teacher.taps))}, "
          f"{detector.preprocess.size} pixels, {detector.teacher.grid} x {detector.teacher.grid} "
          "patches", file=sys.stderr)
    if detector.guided and cfg.theta >= cfg.epochs:
        print(f"--theta {cfg.theta} is all of the {cfg.epochs} epochs: the decoder will not be "
              "guided", file=sys.stderr)
    if detector.teacher.random:
        print(f"teacher: RANDOM weights (seed {cfg.seed}), so text means nothing to it: this shows "
              "that the machinery works, its numbers are not the paper's", file=sys.stderr)


def train_detector(cfg: Config, detector: nn.Module, source: FeatureCache | Images, n: int,
                   device: torch.device, content: dict | None) -> dict:
    """The training loop. Returns the content of a checkpoint. Raises UserError on a NaN loss.

    source: what this process trains on, of n images in all.
    Prompts, fusion, experts and decoder learn; the teacher's features were computed without
    gradients. In the first theta epochs the constraint teaches the prompts, afterwards the decoder.
    There is no validation and no best epoch, which could only be chosen on test images: the last
    step counts.
    """
    parameters = [*detector.student.parameters(), *detector.prompts.parameters()]
    optimizer = torch.optim.Adam(parameters, cfg.lr, fused=True)  # Adam: [paper]; fused: faster
    steps_per_epoch = n / cfg.batch_size
    steps = max(1, round(cfg.epochs * steps_per_epoch))
    step, (rank, count) = 0, process()
    if content is not None:
        optimizer.load_state_dict(content["optimizer"])
        set_random_states(content["random"])
        step = content["step"]
    if rank:
        torch.manual_seed(cfg.seed + 1_000_000 * rank + step)  # its own dropout
    detector.train()
    engine, phase = None, None
    batches = shuffled(len(source), cfg.batch_size // count, steps, cfg.seed, rank)[step:]
    bar = progress(feature_batches(source, batches, detector.teacher, device, cfg.workers),
                   "training", total=steps, initial=step)
    save_every = max(1, steps // 10)
    teacher = {"identity": detector.teacher.identity(),
               "state": detector.teacher.state_dict() if detector.teacher.random else None}

    def state() -> dict:
        return {"detector": NAME, "config": asdict(cfg), "step": step, "steps": steps,
                "student": detector.student.state_dict(), "prompts": detector.prompts.state_dict(),
                "optimizer": optimizer.state_dict(), "random": random_states(), "teacher": teacher}

    with polite_interrupt() as interrupted:
        for features in bar:
            warm_up = step < cfg.theta * steps_per_epoch
            if warm_up != phase:  # DistributedDataParallel must know which parameters learn
                detector.prompts.requires_grad_(warm_up and (detector.fnp or detector.guided))
                engine, phase = data_parallel(detector), warm_up
            loss = engine(features, warm_up=warm_up)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if cfg.clip:  # [ours] D15
                # At tau = 0.001 a CLS token on the wrong side gives a gradient 100 times that of
                # the distillation; Adam remembers its square for thousands of steps, and hardly
                # moves.
                nn.utils.clip_grad_norm_(parameters, cfg.clip)
            optimizer.step()
            step += 1
            due = step % save_every == 0 and step < steps
            if due or step % 20 == 0 or step == steps:  # seldom: item() waits for the GPU
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


def evaluate(cfg: Config, detector: CNC, content: dict, test_set: list[Sample],
             device: torch.device, started: float) -> None:
    """Score the test set; write and print it all."""
    out, labels = Path(cfg.out), np.array([s.label for s in test_set])
    classes = np.array([s.cls for s in test_set])
    images = Images(share(test_set), detector.preprocess)
    encoded = (detector.teacher(x) for x in image_batches(images, cfg, device))
    maps = describe_all(detector, encoded)[1]
    if maps is None:
        return  # rank 0 has them all, and does the rest
    masks = load_masks(test_set, detector.preprocess.size)
    maps = smooth(maps)
    scores, threshold = image_score(maps).numpy(), content["threshold"]
    anomalous = scores > threshold
    results = {"cnc": summarise(scores, labels, classes, maps, masks, device)}
    write_scores(out / "scores.csv", test_set, {"score": scores, "anomalous": anomalous})
    figures = plot_inside(cfg, detector, test_set, masks, maps, threshold, device)
    auroc = 100 * results["cnc"]["pooled"]["I-AUROC"]
    plot_distributions(out / "distributions.png", "Scores of normal and anomalous test images", {
        f"cnc: pooled I-AUROC {auroc:.1f} %": (scores, threshold)}, labels, classes)
    write_json(out / "metrics.json", {
        "script": "cnc", "config": asdict(cfg), "versions": versions(),
        "seconds": round(time.time() - started, 1), "threshold": threshold, "results": results})
    print(table(results))
    if masks is None:
        print("no masks in this data set: image metrics only")
    print(f"wrote metrics.json, scores.csv, distributions.png, {', '.join(figures)} to {out}")
    print(threshold_line(threshold, cfg.quantile, anomalous, labels))


def predict(given: dict, paths: list[str]) -> None:
    """Print one JSON line an image and write an overlay of its own size; no data set is needed."""
    cfg, detector, content, device = load_trained(given)
    files, threshold = find_images(paths), content["threshold"]
    batches = image_batches(Images(files, detector.preprocess), cfg, device)
    for i, x in enumerate(batches):
        maps = smooth(describe_all(detector, [detector.teacher(x)])[1])
        scores = image_score(maps).tolist()
        for sample, score, amap in zip(files[i * cfg.batch_size:], scores, maps):
            target = overlay_path(Path(cfg.out) / "predict", sample.path)
            write_overlay(target, load_image(sample.path), amap, full=2 * threshold)
            print(json.dumps({"path": str(sample.path), "score": score, "threshold": threshold,
                              "anomalous": score > threshold, "overlay": str(target)}))


def load_trained(given: dict) -> tuple:
    """Settings, detector, checkpoint and device for eval and predict."""
    path = checkpoint_path(given)
    content = load_checkpoint(path, NAME)
    if "threshold" not in content:
        raise UserError(f"--checkpoint {path}: its training stopped at step {content['step']} of "
                        f"{content['steps']}; finish it with --resume")
    cfg = Config(**stored_config(content, given, MAY_DIFFER + ("data", "batch_size"), path))
    detector, device = build(cfg, content)
    return cfg, detector, content, device


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 after a mistake of the user's, told in one line, 130
    after Ctrl-C."""
    started = time.time()
    try:
        with joined_processes():
            command, paths, given = parse_args(argv, Config, __doc__)
            if command == "train":
                train(given, started)
            elif command == "predict":
                predict(given, paths)
            else:
                cfg, detector, content, device = load_trained(given)
                test_set = read_dataset(Path(cfg.data), test_only=True)[1]
                with output_folder(Path(cfg.out)):
                    evaluate(cfg, detector, content, test_set, device, started)
        return 0
    except (Exception, KeyboardInterrupt) as e:
        print(f"cnc.py: error: {one_line(e)}", file=sys.stderr)
        return 130 if isinstance(e, KeyboardInterrupt) else 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a class name that a Windows console lacks
    sys.exit(main())
