r"""CADA: one detector, one threshold, no class labels (arXiv:2404.00724), on RevDist (2201.10703).

Guo, Han, Lu, Zhang, Li. Absolute-Unified Multi-Class Anomaly Detection via Class-Agnostic
Distribution Alignment, 2024. This is a reconstruction from public facts, and every choice says
where it comes from: [paper] is stated there, [author] was seen in public code of its first author,
[ours] is a reading of ours. D1, D2, ... number these readings in the README's list of departures.

The idea. A detector that was trained on many classes scores each of them on a scale of its own: a
normal slab of granite scores higher than a torn wire grid. So no single threshold can serve all
classes, and a ranking of all images together is hopeless. CADA looks at the image and predicts two
numbers: the mean u and the maximum gamma that anomaly maps of *normal* images of its class have.
It then rescales the map by them. No class label is used, neither in training nor at test. The
detector is not changed, so nearly any detector will do.

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

From paper to code:

    RevDist, the base detector [paper]           Teacher, Student, RevDist
    cosine loss per flattened layer [author]     RevDist.forward
    anomaly map A [author]                       RevDist.describe
    prediction of (u, gamma) [paper]             CADA.fit, CADA.predict; form: [ours] D5, D6
    alignment A' [author]                        normalise
    Fig. 4(a), labels known: the "oracle"        align, aligned_maps; [ours] D7
    absolute-unified evaluation [paper]          the rows "pooled" of summarise

Read it from the top. The method comes first, in the order in which an image passes through it;
then come training and evaluation, and after them what every such script needs. Sections between
`shared` banners stand in cnc.py letter for letter.

    python cada.py                                     train and evaluate; without data/mvtec and
                                                       data/visa on the small set in data/demo
    python cada.py --data DIR                          on MVTec AD, VisA, or a tree of your own
    python cada.py eval --checkpoint FILE              the same numbers again
    python cada.py predict PATH ... --checkpoint FILE  score images, write heat maps
    python cada.py --base cnc [--checkpoint FILE]      on CNC (cnc.py), trained before or now
    torchrun --nproc-per-node=N cada.py ...            train on N GPUs
"""
from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import ExifTags, Image, ImageOps
from scipy import ndimage
from sklearn.cluster import KMeans
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_predict, train_test_split
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import Compose, ConvertImageDtype, Normalize, PILToTensor, Resize
from tqdm import tqdm
from tyro.conf import Positional

HERE = Path(__file__).resolve().parent


# ==== shared: words used throughout
# These words are used by both scripts throughout.

@dataclass(frozen=True)
class Sample:
    """One image of a data set. No model sees its class `cls`, which serves the report and, in
    cada.py, a comparison with one who knows it."""

    path: Path
    cls: str = ""
    label: int = 0  # 1 is anomalous; told by the folder, since a resized mask may lose a defect
    mask: Path | None = None


class UserError(Exception):
    """A mistake that the user can mend. main() prints its one line and ends with exit code 2."""


def autocast(x: Tensor, dtype: torch.dtype) -> torch.autocast:
    """A context in which matrix products and convolutions run in half precision, if x is on a GPU
    that can. [ours] D18

    Elsewhere it does nothing: not every CPU has a fast half precision, and a V100 only emulates
    bfloat16.
    """
    able = dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", dtype, enabled=x.is_cuda and able)


MOST_CLASSES = 12  # that a picture shows
# ==== end shared


# ---- settings ------------------------------------------------------------------------------------
# The comment beside or above a field is its meaning, its unit or range, and where it comes from. It
# is also what --help says. MVTec AD and VisA are the two usual data sets of the field.

@dataclass
class Config:
    """Train and evaluate CADA on RevDist, evaluate a checkpoint again, or score images with it.

    The defaults are for MVTec AD and VisA. They train RevDist as CADA's first author trains it in
    public code, which was written for a sibling model [author]. On data/demo a smaller teacher and
    fewer steps replace them. With a checkpoint, its settings are the defaults instead.

    The flag --base cnc, which is read before all others, puts CADA on CNC in place of RevDist. The
    other flags are then those of cnc.py: python cada.py --base cnc --help.
    """

    # train (and evaluate), evaluate a checkpoint, or predict: score images of unknown label
    command: Positional[Literal["train", "eval", "predict"]] = "train"
    paths: Positional[tuple[str, ...]] = ()  # for predict: images, or folders of images
    data: str = ""  # data set folder; if not given: data/mvtec, else data/visa, else data/demo
    out: str = "runs/cada"  # folder for everything that is written
    seed: int = 0  # it decides the weights, the batches, the images held out and CADA's levels
    # auto: a GPU of NVIDIA's if there is one, else the CPU; mps: Apple's GPU
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    teacher: str = "wide_resnet50_2"  # frozen ResNet of torchvision's; this one is RD's
    weights: str = "IMAGENET1K_V1"  # of the teacher: torchvision tag, file, or none: random
    # sides in pixels of the square that images are squashed to, a multiple of 32; 256 is RD's
    image_size: int = 256
    batch_size: int = 16  # images a training step [author], of all processes of torchrun together
    iters: int = 5000  # training steps of the detector [author]
    lr: float = 2e-3  # AdamW learning rate, x 0.2 at 80 % of the steps [author]
    # share of the training images that is kept back for the threshold; 0: none [ours] D1
    holdout: float = 0.1
    # compute the teacher's features of the training images once, into an unnamed file in --out;
    # --no-cache computes them anew in every step [ours] D2
    cache: bool = True
    workers: int = 4  # processes that read images; there are never more than CPU cores
    # what eval, predict and --resume read (default: checkpoint.pt in --out); given to train
    # without --resume, the training goes on from it in another --out
    checkpoint: str = ""
    resume: bool = False  # go on with an interrupted training

    def __post_init__(self) -> None:
        """Raises UserError for values that would otherwise fail late, or not at all."""
        if not 0 <= self.seed < 2**32:
            raise UserError("--seed: give a whole number from 0 to 4294967295")
        if self.image_size < 64 or self.image_size % 32:
            raise UserError("--image-size: give a multiple of 32 from 64 on, such as 256")
        if self.batch_size < 1:
            raise UserError("--batch-size: give at least 1")
        if self.iters < 1:
            raise UserError("--iters: give at least 1")
        if not 0 <= self.holdout <= 0.9:
            raise UserError("--holdout: give a share from 0 to 0.9")


# On the demo set two CPU cores are enough. [ours] D3
DEMO = {"teacher": "resnet18", "weights": "none", "image_size": 128, "iters": 200, "workers": 0}


# ---- frozen teacher ------------------------------------------------------------------------------
# The teacher was trained on other images (ImageNet) for another task. What it says of an image is
# the thing to be reproduced, so it must never change.

class Teacher(nn.Module):
    """RevDist's teacher, as in RD: a ResNet up to layer3, without gradients, always in eval mode.

    forward: (B, 3, S, S) -> [(B, C1, S/4, S/4), (B, C2, S/8, S/8), (B, C3, S/16, S/16)], float16.
    RevDist reads nothing of layer4, so layer4 is not run. The features are in half precision
    whether they are cached or not, so that --no-cache changes the time and, but for rounding,
    nothing else; in float16 and not bfloat16, because after BatchNorm values are small and want
    digits more than range. [ours] D2
    Raises UserError for an unknown name, and for weights that cannot be had or do not fit.
    """

    def __init__(self, name: str, weights: str, seed: int) -> None:
        super().__init__()
        self.random = weights == "none"
        # The teacher of a seed is the same whatever was drawn before it, and nothing that is drawn
        # after it, the student's weights above all, depends on the teacher.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                resnet = load_resnet(name, weights)
            except Exception as e:  # unknown, no network, weights that do not fit: many kinds
                raise UserError(f"--teacher {name} --weights {weights}: {str(e)[:200]}; give a "
                                "ResNet of torchvision's and a tag or file of its weights, or none")

        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.layer1 = resnet.layer1
        self.layer2 = resnet.layer2
        self.layer3 = resnet.layer3
        self.hash = None if self.random else weights_hash(self)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> nn.Module:
        """Stay in eval mode whatever the parent does: the BatchNorm statistics are frozen too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Tensor]:
        with autocast(x, torch.float16):
            f1 = self.layer1(self.stem(x))
            f2 = self.layer2(f1)
            f3 = self.layer3(f2)
        return [f1.half(), f2.half(), f3.half()]

    def estimate_statistics(self, batches: Iterable) -> None:
        """Give a random teacher the BatchNorm statistics of the training images. [ours] D3

        Fresh statistics (mean 0, variance 1) let the activations of a random ResNet drift from
        layer to layer, until all images look alike.
        """
        layers = nn.Sequential(self.stem, self.layer1, self.layer2, self.layer3).eval()
        # PyTorch's own function for it: a plain mean over all batches, not a moving one. It runs
        # the layers in train mode, and puts them back into eval mode.
        torch.optim.swa_utils.update_bn(batches, layers)


def load_resnet(name: str, weights: str) -> ResNet:
    """A ResNet of torchvision's with weights from a file or a tag, or with random ones ("none")."""
    resnet = getattr(torchvision.models.resnet, name)(weights=None)
    if Path(weights).is_file():
        resnet.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    elif weights != "none":
        tags = torchvision.models.get_model_weights(name)
        resnet.load_state_dict(tags[weights].get_state_dict())
    return resnet


# ---- RevDist student -----------------------------------------------------------------------------
# The student runs the other way round ("reverse" distillation): it gets what the teacher says in
# the end, squeezes it through a bottleneck, and must say again what the teacher said on the way.
# The bottleneck has room for what normal images have in common, and hopefully none for a defect.

def residual_stage(resnet: ResNet, in_channels: int, planes: int, depth: int,
                   up: bool) -> nn.Sequential:
    """`depth` residual blocks of the kind that `resnet` has. The first one halves height and width,
    or doubles them if `up`: (B, in_channels, H, W) -> (B, planes * expansion, H/2, W/2 or 2H, 2W).

    A stage that doubles is the mirror image of one that halves: where its first block would have a
    convolution of stride 2, in the main path and in the shortcut, it has a 2x2 transposed one.
    """
    block = type(resnet.layer1[0])  # BasicBlock (expansion 1) or Bottleneck (expansion 4)
    options = {"groups": resnet.groups, "base_width": resnet.base_width}  # ResNeXt, Wide ResNet
    out_channels = planes * block.expansion
    if up:
        shortcut = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2, bias=False)
    else:
        shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)
    shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))
    first = block(in_channels, planes, stride=2, downsample=shortcut, **options)

    # torchvision's BasicBlock has its stride in conv1, its Bottleneck in conv2, the 3x3 one.
    if up and block is BasicBlock:
        first.conv1 = nn.ConvTranspose2d(in_channels, planes, 2, stride=2, bias=False)
    elif up:
        width = first.conv2.in_channels
        first.conv2 = nn.ConvTranspose2d(width, width, 2, stride=2, groups=resnet.groups,
                                         bias=False)

    others = [block(out_channels, planes, **options) for _ in range(depth - 1)]
    return nn.Sequential(first, *others)


class Student(nn.Module):
    """What RevDist trains, in RD's shapes: fusion, one-class bottleneck (OCBE), mirrored decoder.

    forward: the teacher's [(B, C1, S/4, S/4), (B, C2, S/8, S/8), (B, C3, S/16, S/16)] -> the same
    shapes, reproduced from a code of (B, 2 * C3, S/32, S/32). The code is the bottleneck: it holds
    a fourteenth of the numbers that are to be reproduced. Only the shapes mirror the teacher's:
    the weights start at random, so that nothing but training can make the two agree.
    83.80 M parameters for wide_resnet50_2: fusion 10.62, bottleneck 48.26, decoder 24.92.
    """

    def __init__(self, teacher_name: str) -> None:
        super().__init__()
        with torch.device("meta"):  # only its layout is read, so no memory is spent on it
            like = torchvision.models.get_model(teacher_name, weights=None)
        expansion = type(like.layer1[0]).expansion
        c1 = 64 * expansion
        c2 = 128 * expansion
        c3 = 256 * expansion

        # All three layers meet at the size of the deepest, S/16: layer1 is halved twice on its way
        # (3x3, stride 2, BatchNorm, ReLU), layer2 once.
        halve = partial(torchvision.ops.Conv2dNormActivation, kernel_size=3, stride=2)
        self.fuse1 = nn.Sequential(halve(c1, c2), halve(c2, c3))
        self.fuse2 = halve(c2, c3)
        self.bottleneck = residual_stage(like, 3 * c3, 512, len(like.layer4), up=False)

        # RD's depths run in ResNet's order, from the deepest features on: these are rebuilt by as
        # many blocks as layer1 has (3 of 3, 4, 6), and not by as many as layer3 has.
        self.decode3 = residual_stage(like, 2 * c3, 256, len(like.layer1), up=True)
        self.decode2 = residual_stage(like, c3, 128, len(like.layer2), up=True)
        self.decode1 = residual_stage(like, c2, 64, len(like.layer3), up=True)

        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        f1, f2, f3 = features
        fused = torch.cat([self.fuse1(f1), self.fuse2(f2), f3], dim=1)  # (B, 3 * C3, S/16, S/16)
        code = self.bottleneck(fused)  # (B, 2 * C3, S/32, S/32)
        d3 = self.decode3(code)
        d2 = self.decode2(d3)
        d1 = self.decode1(d2)
        return [d1, d2, d3]


class RevDist(nn.Module):
    """Reverse distillation, the detector under CADA: its name is [paper], its shapes are RD's.

    The decoder has learned to reproduce the teacher's features e of normal images only; where its d
    fails, the image is anomalous: A(h,w) = mean over layers of 1 - <e,d> / (|e||d|). [author]
    How far it fails on *normal* images differs from class to class: a regular wire grid is easy to
    reproduce, and granite is not. That is the problem that CADA solves.

    CADA and the shared code need this much of a detector: `preprocess` turns an image into a uint8
    tensor; `standardise` turns a batch of them, on the device, into the input of `teacher`, which
    gives frozen features; called on these, the detector gives the loss, and `describe` turns them
    into pooled features and a raw anomaly map.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.size = (cfg.image_size, cfg.image_size)
        # An image that is not square is squashed [ours] D19. Mean and deviation are ImageNet's.
        self.preprocess = Compose([Resize(self.size), PILToTensor()])
        normalise_colours = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.standardise = Compose([ConvertImageDtype(torch.float32), normalise_colours])
        self.teacher = Teacher(cfg.teacher, cfg.weights, cfg.seed)
        self.student = Student(cfg.teacher)

    def decode(self, features: list[Tensor]) -> tuple[list, list]:
        """Teacher features -> the same, and the student's version. Both are float32, because 1 -
        cosine of nearly equal vectors would lose its digits in half precision."""
        # In one memory layout, cuDNN's own, whether they were cached or not: it decides how sums of
        # a convolution are rounded.
        encoded = [f.float().contiguous(memory_format=torch.channels_last) for f in features]
        with autocast(features[0], torch.bfloat16):
            decoded = self.student(encoded)
        return encoded, [d.float() for d in decoded]

    def forward(self, features: list[Tensor]) -> Tensor:
        """The loss: the sum over three layers of 1 - cosine, a scalar in 0..6.

        A layer of an image is one long vector, so that a position counts by the length of its
        features. [author] (In the anomaly map all positions count alike. To train like that, too,
        changed nothing beyond the spread.)
        """
        encoded, decoded = self.decode(features)
        loss = 0.0
        for e, d in zip(encoded, decoded):  # (B, C, H, W) each
            distance = 1 - F.cosine_similarity(e.flatten(1), d.flatten(1), dim=1)  # (B,)
            loss = loss + distance.mean()  # over the batch
        return loss

    def describe(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Teacher features -> (pooled (B, 2 * (C1+C2+C3)), raw anomaly map (B, S, S) in 0..2).

        Pooled over the whole image, frozen features tell the class more than the defect: that is
        why CADA reads these and not the student's. Mean *and* standard deviation over the positions
        [ours] D6: with the mean alone, brightness drowns texture. align_corners=True [author] puts
        the corner values of a layer's map on the corner pixels, so that the three layers line up.
        """
        pooled = []
        for f in features:
            std, mean = torch.std_mean(f.float(), dim=(2, 3))  # (B, C) each
            pooled += [mean, std]

        encoded, decoded = self.decode(features)
        maps = 0.0
        for e, d in zip(encoded, decoded):
            distance = 1 - F.cosine_similarity(e, d, dim=1)[:, None]  # (B, 1, h, w)
            full = F.interpolate(distance, self.size, mode="bilinear", align_corners=True)
            maps = maps + full[:, 0] / len(encoded)  # a mean over layers
        return torch.cat(pooled, dim=1), maps


# ---- CADA ----------------------------------------------------------------------------------------
# Three steps: take u and gamma of each normal map; learn to predict them from the features of the
# image; rescale maps by what is predicted. Nothing below knows of RevDist.

def map_statistics(maps: Tensor) -> Tensor:
    """(N, H, W) -> (N, 2): u, the mean, and gamma, the maximum, of each map. gamma lies above u
    even for a map without contrast, since alignment divides by their difference."""
    u = maps.mean((1, 2))
    least = u + 1e-6 * u.abs().clamp(min=1)
    gamma = maps.amax((1, 2)).maximum(least)
    return torch.stack([u, gamma], dim=1)


def log_statistics(statistics: Tensor) -> Tensor:
    """(N, 2), u and gamma -> (N, 2), log u and log(gamma - u): alignment must get a factor right.

    A value below a thousandth of the median counts as that. Maps must be distances, then: of maps
    that can be negative the mean would have no logarithm.
    """
    u, gamma = statistics.unbind(1)
    values = torch.stack([u, gamma - u], dim=1)
    least = values.median(0).values / 1000
    return values.maximum(least.clamp(min=1e-9)).log()


def direction(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pooled features (N, C) -> unit vectors (N, C): standardised, or the largest channels would
    decide alone; clamped, so that no single channel can; and without length, so that the size of a
    defect counts for less. [ours] D6"""
    return F.normalize(((features - mean) / std).clamp(-3, 3))


@dataclass
class CADA:
    """Predict (u, gamma), the mean and the maximum that anomaly maps of *normal* images of an
    image's class have, from its frozen features; then normalise its map by them. [paper]

    The paper calls the predictor a regression. Ours is linear, on logarithms. Alone it is not
    enough: it errs by a few per cent from image to image, which is as much as a defect adds to a
    score, and a defect that moves the features moves the prediction with it.

    So we let the prediction snap [ours] D5. On normal images the predictions crowd around a few
    levels, about one or two for each class. An image gets the typical statistics of the level that
    its own prediction is nearest to. Then a few per cent no longer matter: to do harm, a defect
    must move the prediction nearer to another level. And all images of a level share one
    affine map, so that their order stays as it is.

    One question remains: how is the regression to predict a class, when each image that it learns
    from has statistics of its own? It learns in rounds. In the first its targets are the statistics
    of the images, as they are. Then they are those of the levels that were found, so that images
    which fell into one level are pulled together, and fewer classes are cut into pieces.

    CADA knows nothing of the detector: any that has pooled features and maps will do.
    """

    mean: Tensor  # (C,) of the training images' pooled features
    std: Tensor  # (C,) their standard deviation; infinite for a channel that says nothing
    weight: Tensor  # (C, 2) of the regression of log u and log(gamma - u)
    bias: Tensor  # (2,)
    noise: Tensor  # (2,) standard deviation of the regression's errors on images it has not seen
    centres: Tensor  # (k, 2) of the levels: predictions divided by the noise
    statistics: Tensor  # (k, 2): u and gamma of each level

    @classmethod
    def fit(cls, features: Tensor, statistics: Tensor, seed: int = 0, rounds: int = 5) -> CADA:
        """Learn from 10 or more normal images: pooled features (N, C) and map_statistics (N, 2) of
        raw maps with values above 0, float tensors on the CPU. No label is used. All numbers in it
        are [ours] D5.
        """
        rows = np.random.default_rng(seed).permutation(len(features))
        rows = torch.from_numpy(rows[:2000])  # these take 45 seconds of one core; more, far longer
        features = features[rows]
        statistics = statistics[rows]
        mean = features.mean(0)
        std = features.std(0, correction=0)
        # Of a channel that hardly varies in training, a rounding error would be a huge deviation.
        std[std <= std.median() / 1000] = torch.inf

        x = direction(features, mean, std).double().numpy()  # (N, C)
        y = log_statistics(statistics).double().numpy()  # (N, 2)
        targets = y
        for _ in range(rounds):
            # 1. The regression: targets = x W + b, with a ridge penalty for each of the two that
            # leave-one-out cross-validation chooses.
            ridge = RidgeCV(np.logspace(-4, 2, 13), alpha_per_target=True).fit(x, targets)

            # 2. How far it errs: each fifth of the images is predicted by a fit on the other four.
            folds = KFold(5, shuffle=True, random_state=seed)
            unseen = cross_val_predict(ridge, x, targets, cv=folds)  # (N, 2)
            noise = (y - unseen).std(0)
            noise = np.maximum(noise, 0.01)  # to alignment 1 % is as good as exact

            # 3. The levels: k-means of these predictions, in units of the noise. k is the smallest
            # for which predictions hardly differ within a level: by a mean square of a quarter,
            # where the errors of the regression have 2, one for each number.
            for k in range(1, min(30, len(x) // 4) + 1):
                levels = KMeans(k, n_init=3, random_state=seed).fit(unseen / noise)
                if levels.inertia_ / len(x) <= 0.25:
                    break

            # 4. A level's u and gamma: the median of its images, because the few that belong
            # elsewhere do not move a median. In the next round they are the targets.
            medians = []
            for level in range(k):
                images = statistics[levels.labels_ == level]
                medians.append(images.median(0).values)  # (2,)
            medians = torch.stack(medians)  # (k, 2)
            targets = log_statistics(medians).double().numpy()[levels.labels_]

        return cls(mean, std, statistics=medians,
                   weight=torch.tensor(ridge.coef_.T, dtype=torch.float32),
                   bias=torch.tensor(ridge.intercept_, dtype=torch.float32),
                   noise=torch.tensor(noise, dtype=torch.float32),
                   centres=torch.tensor(levels.cluster_centers_, dtype=torch.float32))

    def regress(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """By the regression alone, for comparison: (N, C) -> u (N,) and gamma (N,)."""
        u, contrast = self.predict_logs(features).exp().unbind(1)
        return u, u + contrast

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) -> u (N,) and gamma (N,), gamma > u: those of the level whose centre is nearest to
        what the regression predicts."""
        difference = self.predict_logs(features)[:, None] / self.noise - self.centres  # (N, k, 2)
        nearest = difference.square().sum(2).argmin(1)
        u, gamma = self.statistics[nearest].unbind(1)
        return u, gamma

    def predict_logs(self, features: Tensor) -> Tensor:
        """The regression: (N, C) -> log u and log(gamma - u), (N, 2)."""
        return direction(features, self.mean, self.std) @ self.weight + self.bias


def normalise(maps: Tensor, u: Tensor, gamma: Tensor) -> Tensor:
    """A' = (A - u) / (gamma - u), image by image: (N, H, W), (N,), (N,) -> (N, H, W). [author]

    0 is the mean of normal maps of the class and 1 their maximum, whatever the class is.
    """
    u = u[:, None, None]
    gamma = gamma[:, None, None]
    return (maps - u) / (gamma - u)


# ==== shared: map and score
# These turn an anomaly map into one number an image, whatever the detector.

def smooth(maps: Tensor) -> Tensor:
    """Gaussian blur of (N, H, W) maps. Sigma is 4 pixels at 256 x 256 [author], where the kernel is
    cut to 5 x 5; here it is not cut, in proportion at other sizes, and edges repeat. [ours] D4

    The kernel sums to one, so with repeated edges a constant map stays constant. The blur therefore
    commutes with (A - u) / (gamma - u): to normalise before it [author] or after it is the same.
    """
    sigma = maps.shape[-1] / 64  # 256 / 64 = 4
    # A sigma of 0 along the first dimension keeps images apart.
    blurred = ndimage.gaussian_filter(maps.cpu().numpy(), (0, sigma, sigma), mode="nearest")
    return torch.from_numpy(blurred)


def image_score(maps: Tensor) -> Tensor:
    """Mean of the highest 1 % of the pixels of each map, which is steadier than the maximum:
    (N, H, W) -> (N,). [author]"""
    pixels = maps.flatten(1)
    highest = max(1, pixels.shape[1] // 100)  # 655 pixels of 256 x 256
    return pixels.topk(highest, dim=1).values.mean(1)


@torch.no_grad()
def run_on_images(detector: nn.Module, samples: list[Sample], function: Callable) -> list[Tensor]:
    """Apply a function to the teacher's features of all images, batch by batch. Returns its
    results, tensors (N, ...) on the CPU. Raises UserError for an image of which the last result, a
    map or what is taken from it, is not finite: no comparison with it would mean anything."""
    detector.eval()  # BatchNorm by its running statistics: a score must not depend on its batch
    batches = []  # joined once at the end: a tensor that grows would be copied at each batch
    for x in image_batches(detector, samples):
        batches.append([t.cpu() for t in function(detector.teacher(x))])
    results = [torch.cat(parts) for parts in zip(*batches)]
    for sample, values in zip(samples, results[-1]):
        if not values.isfinite().all():
            raise UserError(f"{sample.path}: its anomaly map is not finite; look at the image, or "
                            "train again with a lower --lr")
    return results
# ==== end shared


# ---- training ------------------------------------------------------------------------------------
# First the detector, then CADA on the detector as it is: so CADA can be added to one that was
# trained long ago. With torchrun several processes train together, each on its share of the images.

# torchrun says which of its processes this is, and of how many.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def build(cfg: Config, checkpoint: dict | None) -> RevDist:
    """The detector on its device, with the weights of a checkpoint if there is one."""
    torch.manual_seed(cfg.seed)  # for the student's weights; the teacher draws apart
    detector = RevDist(cfg)
    if checkpoint:
        load_weights(detector, checkpoint)
    if detector.teacher.random:
        print("teacher: RANDOM weights; its numbers are not the paper's", file=sys.stderr)
    # channels_last is the layout of cuDNN's own convolutions.
    return detector.to(choose_device(cfg.device), memory_format=torch.channels_last)


def train_detector(detector: RevDist, samples: list[Sample], checkpoint: dict | None) -> dict:
    """Train on normal images, from where the checkpoint stopped if there is one. Returns the new
    checkpoint. Raises UserError for a loss that is no number.

    Only the student learns: the teacher's features are computed without gradients, and its
    BatchNorm stays in eval mode; the student's BatchNorm learns its statistics here. All classes
    are mixed in every batch, and nobody tells the student which image is of which (model-unified).
    There is no validation and no best epoch, which only test images could choose: the last step
    counts.
    """
    cfg = detector.cfg
    step = checkpoint["step"] if checkpoint else 0
    if step >= cfg.iters:
        print(f"trained already: {step} steps", file=sys.stderr)
        return checkpoint
    if cfg.batch_size % WORLD_SIZE:
        raise UserError(f"--batch-size: give a multiple of the {WORLD_SIZE} processes")
    # A random teacher sees all images in every process, or each would have another teacher.
    if detector.teacher.random and step == 0:
        detector.teacher.estimate_statistics(image_batches(detector, samples))

    # Optimiser and schedule: [author], written for a sibling model. AMSGrad, which that code has
    # had since a month after the paper, changed nothing on the demo set.
    student = detector.student
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr, weight_decay=1e-5, fused=True)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    engine = detector
    # Under torchrun the gradient is the mean over all processes. Their batches are equally large,
    # so this is the gradient of one large batch, if BatchNorm too sees all of it; on CPUs PyTorch
    # has no such BatchNorm, and each process normalises by its own share.
    if WORLD_SIZE > 1:
        if next(student.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(student)
        distributed.init_process_group()
        engine = nn.parallel.DistributedDataParallel(detector)

    share = samples[RANK::WORLD_SIZE]  # the images of this process
    batches = shuffled(len(share), cfg.batch_size // WORLD_SIZE, cfg.iters, cfg.seed)
    features = teacher_features(detector, share, batches[step:])
    detector.train()
    bar = tqdm(features, "training", cfg.iters, initial=step, disable=None)
    for encoded in bar:
        # The rate follows from the step alone, so a resumed run needs no state of a scheduler.
        lr = cfg.lr
        if step >= int(0.8 * cfg.iters):
            lr = 0.2 * cfg.lr
        optimizer.param_groups[0]["lr"] = lr

        loss = engine(encoded)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1

        # Ten checkpoints in all, and a look at the loss before each.
        due = step % max(1, cfg.iters // 10) == 0 or step == cfg.iters
        if due or step % 20 == 0:  # seldom: item() waits for the GPU
            value = loss.item()
            bar.set_postfix(loss=f"{value:.4f}")
            if not math.isfinite(value):
                raise UserError(f"the loss is {value}; give a lower --lr")
        if due and RANK == 0:
            checkpoint = {"step": step, "optimizer": optimizer.state_dict()}
            save_checkpoint(detector, checkpoint)

    if WORLD_SIZE > 1:
        distributed.destroy_process_group()
    return checkpoint


def align(detector: nn.Module, normal: list[Sample], held: list[Sample], checkpoint: dict) -> None:
    """Fit CADA to a trained detector and take the thresholds; all goes into the checkpoint.

    CADA learns from all normal images, those held out for the threshold included. Without them it
    would know only maps of images that the detector was trained on, and lose a point of pooled
    I-AUROC on CNC. With them the promise of the threshold is a little weaker where classes are
    small.
    """
    cfg = detector.cfg

    def summary(features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """All that is needed of normal images. Of their maps it is three numbers each: to keep the
        maps of VisA would take gigabytes."""
        pooled, maps = detector.describe(features)
        return pooled, map_statistics(maps), image_score(smooth(maps))

    features, statistics, raw = run_on_images(detector, normal, summary)  # (N, C), (N, 2), (N,)
    cada = CADA.fit(features, statistics, cfg.seed)
    checkpoint["cada"] = asdict(cada)
    # For comparison, a plain regression of each image's own statistics: what the paper names.
    checkpoint["regress"] = asdict(CADA.fit(features, statistics, cfg.seed, rounds=1))

    # The oracle, Fig. 4(a) of the paper, knows the label: class means over these images. This is
    # the only use of labels, and CADA never reads it. [ours] D7
    classes = np.array([s.cls for s in normal])
    checkpoint["oracle"] = {str(c): statistics[classes == c].mean(0) for c in np.unique(classes)}

    kept_back = set(held)
    rows = [i for i, s in enumerate(normal) if s in kept_back]
    # Aligning commutes with the mean of the highest pixels, too.
    u, gamma = cada.predict(features[rows])
    aligned = (raw[rows] - u) / (gamma - u)
    checkpoint["thresholds"] = {
        "raw": conformal_threshold(raw[rows]),
        "cada": conformal_threshold(aligned)}


# ---- evaluation ----------------------------------------------------------------------------------
# The same images are scored in four variants, so that one table shows what alignment is worth and
# what it costs.

def aligned_maps(detector: nn.Module, samples: list[Sample], checkpoint: dict) -> dict:
    """Smoothed anomaly maps of images in four variants: "raw", as the detector has them; "oracle",
    aligned by the statistics of the true class, if the checkpoint knows all these classes;
    "regress", aligned by a regression alone; "cada", aligned by CADA. Each is a function that
    computes its maps (N, S, S) from the raw ones, so that not all need be in memory at once.

    What to look for: "pooled" should rise from raw to cada, and the oracle shows how far it could.
    "class mean" should stay: within a class alignment has nothing to gain, so where it falls, the
    prediction has taken defects for classes, and does harm.
    """
    def describe(features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Once for all variants, since aligning commutes with blurring."""
        pooled, maps = detector.describe(features)
        return pooled, smooth(maps)

    features, raw = run_on_images(detector, samples, describe)
    variants = {"raw": lambda: raw}
    oracle = checkpoint["oracle"]
    if all(s.cls in oracle for s in samples):
        statistics = torch.stack([oracle[s.cls] for s in samples])  # (N, 2)
        variants["oracle"] = partial(normalise, raw, statistics[:, 0], statistics[:, 1])
    regression = CADA(**checkpoint["regress"])
    variants["regress"] = partial(normalise, raw, *regression.regress(features))
    cada = CADA(**checkpoint["cada"])
    variants["cada"] = partial(normalise, raw, *cada.predict(features))
    return variants


def plot_distributions(path: Path, samples: list[Sample], scores: dict, results: dict,
                       thresholds: dict) -> None:
    """Draw one tick an image: scores by class, normal images above and anomalous ones below the
    line of their class; a panel for each variant that has a threshold, and at most 12 classes.

    Where the normal scores of all classes end at the same place, one threshold serves them all.
    """
    labels = np.array([s.label for s in samples])
    names, line = np.unique([s.cls for s in samples], return_inverse=True)
    names = names[:MOST_CLASSES]
    figure = Figure(figsize=(12, 1.8 + 0.5 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(thresholds), sharey=True, squeeze=False)[0]
    for ax, variant in zip(panels, thresholds):
        # The colours are Okabe and Ito's, which colour-blind readers tell apart too.
        for label, kind, shift, colour in ((0, "normal", -0.2, "#0072B2"),
                                           (1, "anomalous", 0.2, "#D55E00")):
            drawn = (labels == label) & (line < MOST_CLASSES)
            ax.scatter(scores[variant][drawn], line[drawn] + shift, 150, colour, marker="|",
                       alpha=0.7, label=kind)
        ax.axvline(thresholds[variant], color="black", linestyle="--", label="threshold")
        ax.set_yticks(range(len(names)), names, fontsize=12, parse_math=False)
        auroc = results[variant]["pooled"].get("I-AUROC", math.nan)
        ax.set_title(f"{variant}: pooled I-AUROC {auroc:.1%}")
        ax.set_xlabel("image score")
    ax.set_ylim(len(names) - 0.5, -0.5)  # of both panels; downwards
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150, bbox_inches="tight")


# ==== shared: fitting a detector
# Training needs more than a model: images kept back, batches in a fixed order, features that are
# computed once, and a checkpoint.

def hold_out(cfg: Config, samples: list[Sample]) -> tuple[list, list]:
    """Normal images to train on, and those kept back at random for the threshold, because the
    decoder knows the former too well. With --holdout 0 all images are trained on, and the
    threshold, taken from the same, comes out too low. What this costs is printed. [ours] D1"""
    kept, held = samples, samples
    if cfg.holdout > 0:
        kept, held = train_test_split(samples, test_size=cfg.holdout, random_state=cfg.seed)
    lost = {s.cls for s in samples} - {s.cls for s in kept}
    if lost:
        print("--holdout keeps back all training images of", *sorted(lost), file=sys.stderr)
    if len(held) < 99:
        print("threshold: the highest score of", len(held), "normal images; for at most 1 % of "
              "false alarms it takes 99", file=sys.stderr)
    return kept, held


def conformal_threshold(scores: Tensor, quantile: float = 0.99) -> float:
    """The ceil((n + 1) quantile)-th smallest of the scores of n normal images, or the largest.

    A new normal image like these lies above it with a probability of at most 1 - quantile, if n is
    large enough (99 for 0.99) and nothing has learned from these n. (In cada.py CADA has, and the
    promise is a little weaker.) [ours] D1
    """
    n = len(scores)
    rank = min(math.ceil((n + 1) * quantile), n)  # the + 1 counts the new image among the n
    return scores.sort().values[rank - 1].item()


def shuffled(n: int, batch_size: int, steps: int, seed: int) -> list:
    """The batches of a whole training run as lists of indices below n, epoch after epoch. The seed
    alone decides them, so a resumed run goes on with the batches that it would have had."""
    generator = torch.Generator().manual_seed(seed)
    order = []  # a batch may take the last images of an epoch and the first ones of the next
    while len(order) < steps * batch_size:
        order += torch.randperm(n, generator=generator).tolist()
    return [order[i * batch_size:(i + 1) * batch_size] for i in range(steps)]


def teacher_features(detector: nn.Module, samples: list[Sample],
                     batches: list) -> Iterator:
    """Yield the teacher's features of each batch, a list of indices of samples. They are computed
    once [ours] D2, or with --no-cache anew for every batch.

    Training uses no augmentation, so every epoch would compute the same again. The features of each
    layer stay as one float16 array (N, ...) in an unnamed file in --out. The system keeps as much
    of it in memory as fits. The files disappear with the process, even a killed one: they are never
    stale. Raises UserError if the disk is full.
    """
    teacher = detector.teacher
    if not detector.cfg.cache:
        for x in image_batches(detector, samples, batches):
            yield teacher(x)
        return

    # The files are written first and mapped into memory afterwards: to write through the map would
    # kill the process on a full disk, while a plain write raises an error.
    one = teacher(next(image_batches(detector, samples, [[0]])))
    files = [tempfile.TemporaryFile(dir=detector.cfg.out) for _ in one]
    for x in image_batches(detector, samples):
        try:
            for file, f in zip(files, teacher(x)):
                file.write(f.cpu().contiguous().numpy())
                file.flush()
        except OSError as e:
            raise UserError(f"no room in --out for the cache: {e}; make some, or use --no-cache")
    arrays = []
    for file, f in zip(files, one):
        shape = (len(samples), *f.shape[1:])
        arrays.append(np.memmap(file, np.float16, "r", shape=shape))
    for indices in batches:
        yield [torch.from_numpy(array[indices]).to(f.device) for array in arrays]


def save_checkpoint(detector: nn.Module, checkpoint: dict) -> None:
    """Add settings and weights to a checkpoint and write it to checkpoint.pt, whole or not at all:
    neither a kill nor a full disk leaves a half. It holds plain values and tensors:

    config, a dict of Config; weights, a state_dict for each part of the detector, but of a trained
    teacher only a hash; step and optimizer, to go on from; thresholds, by variant; and of cada.py
    cada, regress and oracle. Raises UserError if it cannot be written.
    """
    checkpoint["config"] = asdict(detector.cfg)
    weights = {name: part.state_dict() for name, part in detector.named_children()}
    if not detector.teacher.random:
        weights["teacher"] = detector.teacher.hash
    checkpoint["weights"] = weights
    path = Path(detector.cfg.out, "checkpoint.pt")
    unfinished = path.with_suffix(".partial")
    try:
        torch.save(checkpoint, unfinished)
    except RuntimeError as e:  # torch's, on a full disk for instance
        unfinished.unlink(missing_ok=True)
        raise UserError(f"no checkpoint could be written to --out: {e}; is there room?")
    os.replace(unfinished, path)  # in one go, by the system


def weights_hash(module: nn.Module) -> str:
    """It tells whether a file or a download still holds the weights that it held in training."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        # open_clip may have resized this one, which CPUs of another kind round differently.
        if "positional_embedding" not in name:
            sha.update(tensor.numpy())
    return sha.hexdigest()


def load_weights(detector: nn.Module, checkpoint: dict) -> None:
    """Put the weights of a checkpoint into the detector. Raises UserError if they do not fit it,
    some are missing or left over, or if its trained teacher is another one."""
    for name, part in detector.named_children():  # teacher, student, ...
        try:
            weights = checkpoint["weights"][name]
            if name != "teacher" or part.random:
                part.load_state_dict(weights)
            elif weights != part.hash:
                raise ValueError
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise UserError(f"the checkpoint's {name} does not fit; drop the flags that change it, "
                            "and give the --weights that it was trained with")
# ==== end shared


# ==== shared: data
# Two layouts are read: that of MVTec AD, which most data sets of the field have been converted to,
# and VisA's own archive. Labels come from folders or from VisA's list, never from masks.

SUFFIXES = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
GOOD = ("good", "ok", "normal")  # folders of normal images, in upper or lower case


def paths_in(folder: Path, pattern: str) -> list[Path]:
    """Files and folders in name order, without hidden ones; links are followed."""
    return sorted(folder / name for name in glob(pattern, root_dir=folder, recursive=True))


def images_in(folder: Path, pattern: str) -> list[Path]:
    """The image files among them."""
    return [p for p in paths_in(folder, pattern) if p.suffix.lower() in SUFFIXES]


def read_dataset(root: Path, training: bool = True) -> tuple[list, list]:
    """(train, test) samples of a data set; what was found is printed. Without training there need
    be no training images, and they are not opened.

    Every file is decoded once: a broken one must stop the run before the training and not after.
    Raises UserError that says what is wrong.
    """
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder; give its place, also if it has moved")
    if (root / "split_csv/1cls.csv").is_file():
        train, test = read_visa(root)
    else:
        train, test = read_mvtec(root, training)
    if training and len(train) < 10:  # CADA needs some, and a mistake in the path is more likely
        raise UserError(f"--data {root}: {len(train)} training images, which is too few; put 10 or "
                        "more normal images into <class>/train/good")
    if not training and not test:
        raise UserError(f"--data {root}: no test images in <class>/test/<kind>")
    samples = train + test if training else test
    with ThreadPoolExecutor() as pool:  # threads suffice: Pillow decodes without Python's lock
        checks = pool.map(check_files, samples)
        shares = list(tqdm(checks, "checking images", len(samples), leave=False, disable=None))

    # Else the metrics of pixels would be missing or wrong, and nobody would notice.
    truths = paths_in(root, "**/ground_truth")
    if truths and not sum(shares):
        raise UserError(f"{truths[0]}: no mask marks anything on a test image; arrange masks as in "
                        "data/README.md, or remove all ground_truth")

    # Most of what can go wrong with a data set shows in this line.
    masks = [s.mask for s in test if s.mask]
    used = {s.path for s in train + test} | set(masks)
    others = [p for p in paths_in(root, "**") if p.is_file()]
    others = [p for p in others if not used & {p, p.parent}]  # a folder may be a mask
    defective = sum(s.label for s in test)
    share = sum(shares) / max(1, len(masks))
    print(f"{root}:", len({s.cls for s in samples}), "classes,", len(train), "training,",
          len(test) - defective, "good and", defective, "defective test images,", len(masks),
          f"masks with {share:.1%} of their pixels marked;", len(others), "files not used",
          *others[:1], file=sys.stderr)
    return train, test


def check_files(sample: Sample) -> float:
    """The share of pixels that the sample's mask marks, or 0. Raises UserError if image or mask
    cannot be read, or if the mask does not lie on the image."""
    image = load_image(sample.path)
    if not sample.mask:
        return 0.0
    mask = load_mask(sample.mask)
    with Image.open(sample.path) as file:
        turned = file.getexif().get(ExifTags.Base.Orientation, 1) > 1
    if turned or mask.size != image.size:
        raise UserError(f"mask {sample.mask}: its image has another size, or an EXIF orientation "
                        "that turns it; save both upright and equally large")
    return float(np.mean(mask))


def read_mvtec(root: Path, training: bool) -> tuple[list, list]:
    """Read an MVTec-style tree, <class>/{train/good,test/<kind>,ground_truth/<kind>}/*, or the
    folder of a single class.

    The mask of 000.png is `000_mask` or `000`, with any suffix, or all images in a folder `000`
    (MVTec LOCO): names decide, never sort order. A set may have no masks at all, but if it has
    some, each defective image needs one. Raises UserError where it is missing.
    """
    parts = paths_in(root, "train") + paths_in(root, "test")
    parts = parts or paths_in(root, "*/train") + paths_in(root, "*/test")
    folders = sorted({part.parent for part in parts})
    has_masks = any(images_in(folder, "ground_truth/**") for folder in folders)
    train, test = [], []
    for folder in folders:
        cls = folder.name.encode(errors="replace").decode()  # printable, whatever the system wrote
        normal = [p for p in images_in(folder, "train/*/*") if p.parent.name.lower() in GOOD]
        if training and not normal:
            raise UserError(f"no training images in {folder / 'train/good'}; put normal ones "
                            "there, and not into folders below")
        train += [Sample(path, cls) for path in normal]

        masks = images_in(folder, "ground_truth/*/*")
        masks += {p.parent for p in images_in(folder, "ground_truth/*/*/*")}
        mask_of = by_name(masks)
        for name, path in by_name(images_in(folder, "test/*/*")).items():
            label = int(path.parent.name.lower() not in GOOD)
            if label and has_masks and name not in mask_of:
                raise UserError(f"no mask in {folder / 'ground_truth' / name[0]} for {path.name}; "
                                "add it, remove all ground_truth, or call a folder good")
            mask = mask_of.get(name) if label else None
            test.append(Sample(path, cls, label, mask))
    return train, test


def by_name(paths: list[Path]) -> dict:
    """{("crack", "000"): path} of crack/000.png or crack/000_mask.png. Raises UserError if there
    are both: then nobody knows which belong together."""
    found = {}
    for path in paths:
        name = (path.parent.name, path.stem.removesuffix("_mask"))
        if name in found:
            raise UserError(f"{path} shares its name with {found[name]}; rename one, and keep "
                            "masks in ground_truth, one an image")
        found[name] = path
    return found


def read_visa(root: Path) -> tuple[list, list]:
    """Read the raw VisA archive by its own split file, with columns object, split, label, image and
    mask."""
    samples = {"train": [], "test": []}
    # A spreadsheet may have saved it, with a mark at its start and with semicolons.
    lines = (root / "split_csv/1cls.csv").read_text(encoding="utf-8-sig").splitlines()
    dialect = csv.Sniffer().sniff(lines[0], delimiters=",;\t")
    for row in csv.DictReader(lines, dialect=dialect):
        label = int(row["label"] != "normal")
        mask = root / row["mask"] if label else None
        samples[row["split"]].append(Sample(root / row["image"], row["object"], label, mask))
    return samples["train"], samples["test"]


def open_image(path: Path) -> Image.Image:
    """An image file, decoded and upright. Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except Exception as e:  # Pillow's readers raise many kinds for a broken file
        raise UserError(f"cannot read image {path}: {e}; repair, convert or remove it")


def load_image(path: Path) -> Image.Image:
    """Any image file as 8-bit RGB. In grey images of more than 8 bits 65535 is white, and 1 if they
    are floats. Raises UserError if an image cannot be read, or seems to have another white."""
    image = open_image(path)
    if image.mode == "F" or image.mode.startswith("I"):  # convert() would clip them
        values = np.asarray(image) / (1 if image.mode == "F" else 65535)
        if values.min() < 0 or not 1 / 16 <= values.max() <= 1:  # 12 bits in 16 do not reach it
            raise UserError(f"{path}: its values must lie from 0 to 65535, or to 1 if they are "
                            "floats, and reach a sixteenth of that; convert it to 8 or 16 bits")
        image = Image.fromarray((255 * values).round().astype(np.uint8))
    return image.convert("RGB")


def load_mask(path: Path) -> Image.Image:
    """A mask, or all masks of a folder in one, as a black and white image. Raises UserError if one
    cannot be read.

    Defective is what is not 0, since VisA's masks hold numbers from 1 to 9; but where there are
    values above 127, as in MVTec AD's, these alone, since blur and JPEG leave small ones around.
    A colour counts by its brightest channel, and what is transparent is black. [ours] D20
    """
    masks = []
    for file in images_in(path, "*") or [path]:
        rgba = np.asarray(open_image(file).convert("RGBA"))  # (height, width, 4)
        values = rgba[..., :3].max(2) * (rgba[..., 3] / np.float32(255))
        masks.append(values > (127 if values.max() > 127 else 0))
    return Image.fromarray(np.logical_or.reduce(masks))


def load_masks(samples: list[Sample], size: int) -> np.ndarray:
    """Ground truth as bool (N, size, size). Where there is no mask, nothing is marked.

    Binarised first and resized (nearest neighbour) after it: the other way round thin defects blur.
    """
    masks = np.zeros((len(samples), size, size), bool)
    for i, s in enumerate(samples):
        if s.mask:
            masks[i] = load_mask(s.mask).resize((size, size), Image.NEAREST)
    return masks


def load_batch(preprocess: Callable, samples: list[Sample]) -> Tensor:
    """Images -> uint8 (B, 3, S, S)."""
    return torch.stack([preprocess(load_image(s.path)) for s in samples])


def image_batches(detector: nn.Module, samples: list[Sample],
                  batches: list | None = None) -> Iterator:
    """Yield preprocessed images (B, 3, S, S) on the detector's device: these batches of indices, or
    if there are none all samples in order, with a progress bar."""
    cfg = detector.cfg
    device = next(detector.parameters()).device
    bar_off = True  # the training has a bar of its own
    if batches is None:
        batches = [rows.tolist() for rows in torch.arange(len(samples)).split(cfg.batch_size)]
        bar_off = None  # tqdm: off where the output is no terminal
    workers = min(cfg.workers, os.cpu_count() or 1)
    if len(batches) == 1:  # to start a process would take longer
        workers = 0
    # Workers send uint8, a quarter of float32, through shared memory, of which a container has
    # little. If it is full this process would wait for ever: hence the timeout, in seconds.
    loader = DataLoader(
        samples, batch_sampler=batches, collate_fn=partial(load_batch, detector.preprocess),
        num_workers=workers, timeout=300 if workers else 0)
    for x in tqdm(loader, "images", leave=False, disable=bar_off):
        yield detector.standardise(x.to(device))
# ==== end shared


# ==== shared: metrics
# Good images and pixels are negatives, defective ones positives; a higher score is more anomalous.

def area_under(x: np.ndarray, y: np.ndarray, limit: float = 1.0) -> float:
    """Area under the curve through points (x, y), x rising, from 0 to `limit`, divided by `limit`:
    1 is perfect. Between two points, and so at the limit, the curve is a straight line."""
    inside = x <= limit
    end = np.interp(limit, x, y)
    return float(np.trapezoid(np.append(y[inside], end), np.append(x[inside], limit)) / limit)


def ranking_metrics(kind: str, scores: np.ndarray, positive: np.ndarray) -> dict:
    """<kind>-AUROC, <kind>-AP and <kind>-F1max in 0..1 of scores with bool labels of the same
    shape; for pixels, kind "P", (N, H, W), also AUPRO. {} if all labels are equal.

    Exact: every distinct score is a threshold. But between two scores of positives only the number
    of false positives changes. So the K distinct scores of positives, few among pixels, give all
    the points that are needed: one where the threshold lies just above such a score, and one where
    it lies at it. Memory: 12 bytes a pixel if 2 % are anomalous, 20 if 7 %.

    AUPRO is the area under a ROC curve in which a defective pixel weighs 1 / (area of its region),
    so that each 8-connected region counts once, however large; up to a false-positive rate of 0.3.
    """
    positives = np.count_nonzero(positive)
    negatives = positive.size - positives
    if positives == 0 or negatives == 0:
        return {}

    # How many scores, and how many true positives (tp), lie above each threshold, and how many at
    # it or above: (K,) each, from the highest threshold on.
    ranked = np.sort(scores, axis=None)
    ranked_positive = np.sort(scores[positive])
    thresholds = np.unique(ranked_positive)[::-1]
    flagged_above = scores.size - np.searchsorted(ranked, thresholds, side="right")
    flagged = scores.size - np.searchsorted(ranked, thresholds, side="left")
    tp_above = positives - np.searchsorted(ranked_positive, thresholds, side="right")
    tp = positives - np.searchsorted(ranked_positive, thresholds, side="left")

    def curve(above: np.ndarray, at: np.ndarray) -> np.ndarray:
        """(K,), (K,) -> (2K + 2,): both points of each threshold, between the corners 0 and 1."""
        return np.concatenate([[0], np.stack([above, at], axis=1).ravel(), [1]])

    fpr = curve((flagged_above - tp_above) / negatives, (flagged - tp) / negatives)
    tpr = curve(tp_above / positives, tp / positives)
    metrics = {f"{kind}-AUROC": area_under(fpr, tpr),
               f"{kind}-AP": float(np.sum((tp - tp_above) / positives * tp / flagged)),
               f"{kind}-F1max": float(np.max(2 * tp / (flagged + positives)))}
    if kind == "P":
        neighbours = np.zeros((3, 3, 3))
        neighbours[1] = 1  # the 8 around a pixel, and none in another image
        regions, count = ndimage.label(positive, neighbours)
        region = regions[positive]  # the number of the region that each defective pixel is in
        weight = 1 / np.bincount(region)[region]
        highest_first = np.argsort(scores[positive])[::-1]
        # overlap[k]: how much of a region, on average, the k highest defective pixels cover
        overlap = np.append(0, weight[highest_first].cumsum()) / count
        metrics["AUPRO"] = area_under(fpr, curve(overlap[tp_above], overlap[tp]), 0.3)
    return metrics


def summarise(scores: np.ndarray, labels: np.ndarray, classes: np.ndarray, maps: np.ndarray,
              masks: np.ndarray) -> dict:
    """All metrics by both protocols: {class: {}, ..., "class mean": {}, "pooled": {}}.

    pooled: all classes in one ranking, as one threshold sees them (absolute-unified).
    class mean: a ranking per class, then the unweighted mean (model-unified), which allows each
    class a threshold of its own, so that a difference in level costs nothing. A class without good
    or without defective images has no such metric, and does not count.
    """
    def metrics(rows: np.ndarray) -> dict:
        of_images = ranking_metrics("I", scores[rows], labels[rows] == 1)
        of_pixels = ranking_metrics("P", maps[rows], masks[rows])  # {} without masks
        return of_images | of_pixels

    results = {str(c): metrics(classes == c) for c in np.unique(classes)}
    pooled = metrics(np.ones(len(scores), bool))
    mean = {}
    for name in pooled:
        values = [found[name] for found in results.values() if name in found]
        if values:
            mean[name] = float(np.mean(values))
    return results | {"class mean": mean, "pooled": pooled}
# ==== end shared


# ==== shared: report
# What is printed and written of test images. The table comes first: no picture that fails may cost
# the numbers.

def report(cfg: Config, samples: list[Sample], variants: dict, thresholds: dict, decides: str,
           scales: dict) -> tuple[dict, dict]:
    """Print and write how well the maps of some variants tell good from defective samples. Returns
    image scores (N,) and metrics, both by variant.

    variants: by name a function that computes smoothed maps (N, S, S), called one after the other,
    since maps are large; thresholds: by variant, of which `decides` is the one that flags images;
    scales: the values that are brightest in heatmaps.png, of the variants that it shows. No number
    here was chosen by a test label, except for the maxima of F1, which say what the best threshold
    would have been.
    """
    labels = np.array([s.label for s in samples])
    classes = np.array([s.cls for s in samples])
    masks = load_masks(samples, variants[decides]().shape[-1])
    scores = {}
    results = {}
    for variant, compute_maps in variants.items():
        maps = compute_maps()
        scores[variant] = image_score(maps).numpy()
        results[variant] = summarise(scores[variant], labels, classes, maps.numpy(), masks)
        del maps  # before the next are computed

    print_table(results)
    flagged = scores[decides] > thresholds[decides]
    good = flagged[labels == 0]  # these should be False
    bad = flagged[labels == 1]  # and these True
    print(f"threshold {thresholds[decides]:.4f}: flags {good.sum()} of {len(good)} good and "
          f"{bad.sum()} of {len(bad)} defective test images; more in {cfg.out}")
    write_scores(Path(cfg.out, "scores.csv"), samples, scores, flagged)
    # Everything needed to quote a number: settings, thresholds, metrics in 0..1.
    content = {"config": asdict(cfg), "thresholds": thresholds, "results": results}
    Path(cfg.out, "metrics.json").write_text(json.dumps(content, indent=2))
    plot_heatmaps(Path(cfg.out, "heatmaps.png"), samples, masks, variants, scales)
    return scores, results


def print_table(results: dict) -> None:
    """A line for each class, the class mean and the pooled metrics, of each variant; in %."""
    parts = next(iter(results.values()))  # all variants have the same
    names = list(parts["pooled"])
    width = max(len(part) for part in parts)
    print(" " * (width + 9) + "".join(f"{name:>9}" for name in names))
    for part in parts:
        for variant in results:
            found = results[variant][part]
            values = [f"{100 * found.get(name, math.nan):9.1f}" for name in names]
            print(f"{part:<{width}}  {variant:<7}", *values, sep="")


def write_scores(path: Path, samples: list[Sample], scores: dict, flagged: np.ndarray) -> None:
    """One row an image. A file name that is no UTF-8 is written as the system has it."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "label", *scores, "anomalous"])
        for i, s in enumerate(samples):
            values = [scores[variant][i] for variant in scores]
            writer.writerow([s.path, s.cls, s.label, *values, flagged[i]])


def plot_heatmaps(path: Path, samples: list[Sample], masks: np.ndarray, variants: dict,
                  scales: dict) -> None:
    """A column an image: of each class the middle good and the middle defective one, which nobody
    picked, at most 24 in all. Below it the ground truth, and its maps in the variants that have a
    scale.

    All maps in a row have the same fixed scale, black at 0: to scale each image by itself would
    paint good images in the colours of defects.
    """
    groups = {}
    for i, s in enumerate(samples):
        groups.setdefault((s.cls, s.label), []).append(i)
    columns = [groups[key][len(groups[key]) // 2] for key in sorted(groups)[:2 * MOST_CLASSES]]
    images = {i: load_image(samples[i].path).resize((160, 160)) for i in columns}

    rows = [("image", images, None)]  # name, pictures by index, scale
    if masks.any():
        rows.append(("ground truth", masks, 1))
    for variant, scale in scales.items():
        maps = variants[variant]()
        pictures = {i: maps[i].clone() for i in columns}
        rows.append((f"{variant} map\n0 to {scale:.3g}", pictures, scale))

    size = (1.1 * len(columns) + 2, 1.1 * len(rows) + 0.5)  # inches
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes, (name, pictures, scale) in zip(grid, rows):
        for ax, i in zip(axes, columns):
            ax.set(xticks=[], yticks=[], frame_on=False)
            ax.imshow(np.asarray(pictures[i]), "inferno", vmin=0, vmax=scale)
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=12)
    for ax, i in zip(grid[0], columns):
        kind = "defective" if samples[i].label else "good"
        ax.set_title(f"{samples[i].cls}\n{kind}", fontsize=12, parse_math=False)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


OVERLAY = ".overlay.png"


def write_predictions(cfg: Config, threshold: float, anomaly_maps: Callable) -> None:
    """For each image that the command line names: a line of JSON, and the image with its heat map
    on it. anomaly_maps: samples -> smoothed maps (N, S, S).

    A map's value of 0 is clear and twice the threshold is the hottest, in every image. A file that
    cannot be scored is reported, and the others are scored all the same. Raises UserError in the
    end if there was one.
    """
    files = []
    for path in map(Path, cfg.paths):
        files += images_in(path, "**") if path.is_dir() else [path]
    files = [p for p in files if not p.name.endswith(OVERLAY)]
    if not files:
        raise UserError(f"no images that Pillow reads in {', '.join(cfg.paths)}; name some")
    folder = Path(cfg.out, "predict")
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for i, path in enumerate(files):
        try:
            amap = anomaly_maps([Sample(path)])
        except UserError as e:
            print(e, file=sys.stderr)
            failed.append(path)
            continue
        score = image_score(amap).item()

        heat = (amap[0] / (2 * threshold)).clamp(0, 1).numpy()  # (S, S)
        # (S, S, 4): the colder, the more transparent
        colours = colormaps["inferno"](heat, alpha=0.8 * heat, bytes=True)
        image = load_image(path)
        overlay = Image.fromarray(colours).resize(image.size)
        image.paste(overlay, mask=overlay)
        # A name may have 255 bytes at most. By its suffix the next run knows that it is ours.
        target = folder / f"{i:04}-{path.stem[:50]}{OVERLAY}"
        image.save(target)
        print(json.dumps({"path": str(path), "score": score, "threshold": threshold,
                          "anomalous": score > threshold, "overlay": str(target)}))
    if failed:
        raise UserError(f"{len(failed)} of {len(files)} images not scored, {failed[0]} the first")
# ==== end shared


# ==== shared: command line and device
# Settings, checkpoint, device: all that is decided before the first image is read.

def read_command_line(argv: list[str] | None, published: Config, demo: dict,
                      visa: dict) -> tuple[Config, dict | None]:
    """The settings, and the checkpoint if one is to be read. Raises UserError if it cannot be.

    tyro makes a flag of each field of Config, and its help of the comment beside it. The command
    line is read twice: first to learn where the defaults come from, then with these defaults, so
    that a flag goes before everything. They come from the checkpoint, else from the data set
    (`demo`, `visa`), else they are the `published` ones.
    """
    config = type(published)
    cfg = tyro.cli(config, args=argv, default=published)
    if (cfg.command == "predict") != bool(cfg.paths):
        raise UserError(f"{cfg.command}: name images after predict, and only there")

    # A new training: the data set decides.
    if cfg.command == "train" and not cfg.resume and not cfg.checkpoint:
        root = HERE / "data/demo"
        for name in ("visa", "mvtec"):
            if (HERE / "data" / name).is_dir():
                root = HERE / "data" / name
        if cfg.data:
            root = Path(cfg.data).resolve()
        preset = {}
        if root == HERE / "data/demo":
            preset = demo
        elif (root / "split_csv/1cls.csv").is_file():
            preset = visa
        defaults = replace(published, data=str(root), **preset)
        checkpoint = None

    # All else starts from a checkpoint, and writes into its folder, except for a training that
    # only starts from it.
    else:
        path = Path(cfg.checkpoint or Path(cfg.out, "checkpoint.pt"))
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            defaults = config(**checkpoint["config"])
        except Exception as e:  # no such file, no checkpoint, a malicious or another script's, ...
            raise UserError(f"--checkpoint {path}: {str(e)[:100]}; name one that this script (and "
                            "--base) wrote, or train first")
        new = cfg.command == "train" and not cfg.resume
        defaults = replace(defaults, out=published.out if new else str(path.parent))

    cfg = tyro.cli(config, args=argv, default=defaults)
    # The checkpoint must find both again from any folder.
    cfg.data = os.path.abspath(cfg.data)
    if os.path.isfile(cfg.weights):
        cfg.weights = os.path.abspath(cfg.weights)
    return cfg, checkpoint


def prepare_out(cfg: Config) -> None:
    """Make --out. A training first removes what an earlier one left there, which could be taken for
    its own if it stops half-way or has no test images; but not the checkpoint that it starts from.
    """
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    stale = []
    if cfg.command == "train":
        stale = ["scores.csv", "metrics.json", "heatmaps.png", "distributions.png"]
        if not cfg.resume and not cfg.checkpoint:
            stale.append("checkpoint.pt")
    for name in stale:
        Path(cfg.out, name).unlink(missing_ok=True)


def choose_device(name: str) -> torch.device:
    """Turn --device into a torch device, under torchrun each process into its own. Raises UserError
    if this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name == "cuda":  # torchrun counts the processes of one machine
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError):  # each back end has its own
        raise UserError(f"--device {name}: not on this machine; use --device auto")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        torch.backends.cudnn.deterministic = True  # convolutions repeat; not all else does
    return torch.device(name)
# ==== end shared


# ---- the script ----------------------------------------------------------------------------------
# `run` tells the whole story, and `main` says what can go wrong with it.

@dataclass
class Base:
    """The first flag that is read. It decides which others there are."""

    base: Literal["revdist", "cnc"] = "revdist"  # the detector that CADA aligns


def run(argv: list[str], published: Config, demo: dict, visa: dict, build_detector: Callable,
        train: Callable) -> None:
    """Load, train, align, evaluate. All arguments but the first are of a detector, RevDist or CNC:
    its default settings, what replaces them on the demo set and on VisA, and its two functions."""
    cfg, checkpoint = read_command_line(argv, published, demo, visa)
    if cfg.command != "train" and "cada" not in checkpoint:
        raise UserError("no CADA in the checkpoint: --resume its training, or add CADA to a CNC by "
                        "cada.py --base cnc --checkpoint FILE")
    training = cfg.command == "train"
    normal, test = [], []
    if cfg.command != "predict":
        normal, test = read_dataset(Path(cfg.data), training)
    detector = build_detector(cfg, checkpoint)
    if RANK == 0:
        prepare_out(cfg)

    if training:
        kept, held = hold_out(cfg, normal)
        checkpoint = train(detector, kept, checkpoint)
    if RANK > 0:  # of torchrun's processes only the first evaluates and writes
        return
    if training:
        align(detector, normal, held, checkpoint)
        save_checkpoint(detector, checkpoint)

    thresholds = checkpoint["thresholds"]
    if cfg.command == "predict":
        write_predictions(cfg, thresholds["cada"],
                          lambda samples: aligned_maps(detector, samples, checkpoint)["cada"]())
    elif test:
        variants = aligned_maps(detector, test, checkpoint)
        scales = {variant: 2 * threshold for variant, threshold in thresholds.items()}
        scores, results = report(cfg, test, variants, thresholds, "cada", scales)
        plot_distributions(Path(cfg.out, "distributions.png"), test, scores, results, thresholds)
    else:
        print(f"no test images, so nothing to evaluate; threshold {thresholds['cada']:.4f}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0 on success, 2 after a mistake of the user's, told in one
    line, and 130 after Ctrl-C."""
    # A missing or unwritable file is a mistake too, and its own message names it.
    mistakes = (UserError, OSError)
    try:
        first, others = tyro.cli(Base, args=argv, add_help=False, return_unknown_args=True)
        if first.base == "cnc":
            if not (HERE / "cnc.py").is_file():
                raise UserError("--base cnc: cnc.py does not lie beside cada.py")
            import cnc
            mistakes = (UserError, cnc.UserError, OSError)
            published = replace(cnc.Config(), out=Config.out)
            run(others, published, cnc.DEMO, cnc.VISA, cnc.build, cnc.train_detector)
        else:
            run(others, Config(), DEMO, {}, build, train_detector)
        return 0
    except mistakes as e:
        # Of a mistake that a loader's worker found, the end of its traceback.
        message = str(e).rsplit("UserError: ", 1)[-1]
        print("cada.py: error:", " ".join(message.split()), file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("cada.py: error: the GPU's memory is full; lower --batch-size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cada.py: error: interrupted; --resume goes on from the last checkpoint, if any",
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for names that the console cannot print
    sys.exit(main())
