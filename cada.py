r"""CADA: one detector, one threshold, no class labels (arXiv:2404.00724), on RevDist.

Guo, Han, Lu, Zhang, Li. Absolute-Unified Multi-Class Anomaly Detection via Class-Agnostic
Distribution Alignment, 2024. This is a reconstruction from public facts, and every choice says
where it comes from: [paper] is stated in the paper's abstract, captions or settings; [author] was
seen in public code of its first author (github.com/guojiajeremy/ReContrast); [ours] is a reading of
ours. D1, D2, ... number our readings in the README's list of departures.

The idea. A detector that was trained on many classes scores each of them on a scale of its own: a
normal slab of granite may score higher than a torn wire grid. So no single threshold serves all
classes, and a ranking of all images together is poor. CADA looks at the image and predicts two
numbers: the mean u and the typical maximum gamma of an anomaly map of a *normal* image of its
class. It then rescales the map by them. No class label is used, neither in training nor at test.
The detector is not changed, so nearly any detector will do. The one here is RevDist, which is the
paper's name for RD, reverse distillation (Deng and Li, CVPR 2022, arXiv:2201.10703).

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

The code blurs before it aligns, which gives the same (see `smooth`).

From paper to code:

    RevDist, the base detector [paper]           Teacher, Student, RevDist
    cosine loss per flattened layer [author]     RevDist.forward
    anomaly map A [author]                       RevDist.describe
    prediction of (u, gamma) [paper]             fit_regression; its form: [ours] D5
    snapping of the prediction [ours] D6         find_levels, CADA.fit, CADA.predict
    alignment A' [author]                        normalise
    Fig. 4(a), labels known: the "oracle"        calibrate, aligned_maps; [ours] D7
    absolute-unified evaluation [paper]          the rows "pooled" of the table

Read it from the top. Down to the appendix it is the paper: the method, in the order in which an
image passes through it, then training and evaluation. The appendix is what any such script needs.
Sections between `shared` banners stand in cnc.py letter for letter.

    python cada.py                                     train and evaluate; without data/mvtec and
                                                       data/visa on the small set in data/demo
    python cada.py --data DIR                          on MVTec AD, VisA, or a tree of your own
    python cada.py eval --checkpoint FILE              the same numbers again
    python cada.py predict PATH ... --checkpoint FILE  score images, write heat maps
    python cada.py --cnc FILE                          on the CNC in a checkpoint of cnc.py
    torchrun --nproc-per-node=N cada.py ...            train on N GPUs
"""
from __future__ import annotations

import csv
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.pop("MPLBACKEND", None)  # figures are files here; a notebook's backend may be missing

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import ExifTags, Image, ImageOps
from scipy import ndimage
from scipy.cluster.hierarchy import fcluster, ward
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import train_test_split
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import Compose, ConvertImageDtype, Normalize, PILToTensor, Resize
from tqdm import tqdm
from tyro.conf import Positional


# ---- settings ------------------------------------------------------------------------------------
# The comment beside or above a field is its meaning, its unit or range, and where it comes from. It
# is also what --help says. MVTec AD and VisA are the two usual data sets of the field.

@dataclass
class Config:
    """Train and evaluate CADA on RevDist, evaluate a checkpoint again, or score images with it.

    The defaults are for MVTec AD and VisA. They train RevDist as CADA's first author trains
    ReContrast, a sibling of it, in public code [author]. On data/demo a smaller teacher and fewer
    steps replace them. With a checkpoint, its settings are the defaults instead.
    """

    teacher: str = "wide_resnet50_2"  # frozen ResNet of torchvision's; this one is RD's
    weights: str = "IMAGENET1K_V1"  # of the teacher: torchvision tag, file, or none: random
    # sides in pixels of the square that images are squashed to, a multiple of 32; 256 is RD's
    image_size: int = 256
    batch_size: int = 16  # images a training step [author], of all processes of torchrun together
    iters: int = 5000  # training steps of the detector [author]
    lr: float = 2e-3  # AdamW learning rate, x 0.2 at 80 % of the steps [author]
    # checkpoint of cnc.py: CADA aligns the CNC in it in place of RevDist, trains no detector, and
    # takes over its seed, its images held out and its weights
    cnc: str = ""

    # train (and evaluate), evaluate a checkpoint, or predict: score images of unknown label
    command: Positional[Literal["train", "eval", "predict"]] = "train"
    paths: Positional[tuple[str, ...]] = ()  # for predict: images, or folders of images
    data: str = ""  # data set folder; if not given: data/mvtec, else data/visa, else data/demo
    out: str = "runs/cada"  # folder for everything that is written; with --cnc runs/cada-on-cnc
    seed: int = 0  # it decides the weights, the batches, the images held out and CADA's draws
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one, else the CPU
    # share of the training images that is kept back for the threshold; 0: none [ours] D9
    holdout: float = 0.1
    # compute the teacher's features of the training images once, into an unnamed file in --out;
    # --no-cache computes them anew in every step [ours] D2
    cache: bool = True
    workers: int = 4  # processes that read images; there are never more than CPU cores
    # what eval, predict and --resume read; if not given: checkpoint.pt in --out
    checkpoint: str = ""
    resume: bool = False  # go on with an interrupted training

    def check(self) -> None:
        """Raises UserError for what RANGES cannot say."""
        if self.image_size % 32:
            raise UserError("--image-size: give a multiple of 32, such as 256")


RANGES = {"image_size": (64, 4096), "batch_size": (1, 10**6), "iters": (1, 10**9), "lr": (0, 1),
          "seed": (0, 2**32 - 1), "holdout": (0, 0.9), "workers": (0, 1000)}
# On the demo set two CPU cores are enough. [ours] D1
DEMO = {"teacher": "resnet18", "weights": "none", "image_size": 128, "iters": 200, "workers": 0}


# ---- frozen teacher ------------------------------------------------------------------------------
# The teacher was trained on other images (ImageNet) for another task. What it says of an image is
# the thing to be reproduced, so it must never change.

class Teacher(nn.Module):
    """RevDist's teacher, as in RD: a ResNet up to layer3, without gradients, always in eval mode.

    forward: (B, 3, S, S) -> [(B, C1, S/4, S/4), (B, C2, S/8, S/8), (B, C3, S/16, S/16)].
    RevDist reads nothing of layer4, so layer4 is not run. The features are float16, so that they
    can be stored: after BatchNorm they are small, and want the digits of float16 more than the
    range of bfloat16. [ours] D2
    Raises UserError for an unknown name, and for weights that cannot be had or do not fit.
    """

    def __init__(self, name: str, weights: str, seed: int) -> None:
        super().__init__()
        self.random = weights == "none"
        # A random stream of its own: teacher and student do not depend on each other's draws.
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
    """`depth` residual blocks of the kind that `resnet` has. The first block halves height and
    width, or doubles them if `up`:
    (B, in_channels, H, W) -> (B, planes * expansion, H/2, W/2 or 2H, 2W).

    Without `up` this is torchvision's own stage. With `up` two layers of its first block differ:

                                 down (torchvision's own)   up (the mirror image)
        shortcut                 1x1, stride 2              2x2 transposed, stride 2
        BasicBlock's conv1       3x3, stride 2              2x2 transposed, stride 2
        or Bottleneck's conv2    3x3, stride 2              2x2 transposed, stride 2
    """
    block = type(resnet.layer1[0])  # BasicBlock (expansion 1) or Bottleneck (expansion 4)
    options = {"groups": resnet.groups, "base_width": resnet.base_width}  # ResNeXt, Wide ResNet
    out_channels = planes * block.expansion
    double = partial(nn.ConvTranspose2d, kernel_size=2, stride=2, bias=False)
    if up:
        shortcut = double(in_channels, out_channels)
    else:
        shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)
    shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    first = block(in_channels, planes, stride=2, downsample=shortcut, **options)
    if up and block is BasicBlock:
        first.conv1 = double(in_channels, planes)
    elif up:
        width = first.conv2.in_channels
        first.conv2 = double(width, width, groups=resnet.groups)

    others = [block(out_channels, planes, **options) for _ in range(depth - 1)]
    return nn.Sequential(first, *others)


class Student(nn.Module):
    """What RevDist trains, in RD's shapes: fusion, one-class bottleneck (OCBE), mirrored decoder.

    forward: the teacher's [(B, C1, S/4, S/4), (B, C2, S/8, S/8), (B, C3, S/16, S/16)] -> the same
    shapes, reproduced from a bottleneck of (B, 2 * C3, S/32, S/32), which holds a fourteenth of the
    numbers that are to be reproduced. Only the shapes mirror the teacher's: the weights start at
    random, so that nothing but training can make the two agree.
    83.80 M parameters for wide_resnet50_2: fusion 10.62, bottleneck 48.26, decoder 24.92.
    """

    def __init__(self, teacher_name: str) -> None:
        super().__init__()
        with torch.device("meta"):  # only its layout is read, so no memory is spent on it
            layout = torchvision.models.get_model(teacher_name, weights=None)
        expansion = type(layout.layer1[0]).expansion
        c1 = 64 * expansion
        c2 = 128 * expansion
        c3 = 256 * expansion

        # All three layers meet at the size of the deepest, S/16: layer1 is halved twice on its way
        # (3x3, stride 2, BatchNorm, ReLU), layer2 once.
        halve = partial(torchvision.ops.Conv2dNormActivation, kernel_size=3, stride=2)
        self.fuse1 = nn.Sequential(halve(c1, c2), halve(c2, c3))
        self.fuse2 = halve(c2, c3)
        self.bottleneck = residual_stage(layout, 3 * c3, 512, len(layout.layer4), up=False)

        # The numbers of blocks run as in the encoder (3, 4, 6 for wide_resnet50_2): decode3, the
        # first to run, has as many as layer1, not as layer3. That is how RD's code has it.
        self.decode3 = residual_stage(layout, 2 * c3, 256, len(layout.layer1), up=True)
        self.decode2 = residual_stage(layout, c3, 128, len(layout.layer2), up=True)
        self.decode1 = residual_stage(layout, c2, 64, len(layout.layer3), up=True)

        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        f1, f2, f3 = features
        fused = torch.cat([self.fuse1(f1), self.fuse2(f2), f3], dim=1)  # (B, 3 * C3, S/16, S/16)
        squeezed = self.bottleneck(fused)  # (B, 2 * C3, S/32, S/32)
        d3 = self.decode3(squeezed)
        d2 = self.decode2(d3)
        d1 = self.decode1(d2)
        return [d1, d2, d3]


# ---- RevDist -------------------------------------------------------------------------------------

class RevDist(nn.Module):
    """Reverse distillation, the detector under CADA: its name is [paper], its shapes are RD's.

    The decoder has learned to reproduce the teacher's features e of normal images only; where its d
    fails, the image is anomalous: A(h,w) = mean over layers of 1 - <e,d> / (|e||d|). [author]
    How far it fails on *normal* images differs from class to class: a regular wire grid is easy to
    reproduce, and granite is not. That is the problem that CADA solves.

    This is all that CADA and the shared code ask of a detector:

        preprocess     image -> uint8 tensor (3, S, S)
        standardise    batch of these, on the device -> float (B, 3, S, S), the teacher's input
        teacher        -> features, a list of three float16 tensors; .random: no trained weights
        forward        features -> loss, a scalar
        describe       features -> pooled features (B, F), raw anomaly maps (B, S, S)
        size           S
        student        the part that learns
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.size = cfg.image_size
        # An image that is not square is squashed [ours] D3. Mean and deviation are ImageNet's.
        self.preprocess = Compose([Resize((self.size, self.size)), PILToTensor()])
        normalise_colours = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.standardise = Compose([ConvertImageDtype(torch.float32), normalise_colours])
        self.teacher = Teacher(cfg.teacher, cfg.weights, cfg.seed)
        self.student = Student(cfg.teacher)

    def decode(self, features: list[Tensor]) -> tuple[list, list]:
        """Teacher features -> the same, and the student's version. Both are float32, because 1 -
        cosine of nearly equal vectors would lose its digits in half precision."""
        # One memory layout, cuDNN's own, for features from the cache and from the teacher: the
        # layout decides the order of a convolution's sums, and so their rounding.
        encoded = [f.float().contiguous(memory_format=torch.channels_last) for f in features]
        with autocast(features[0], torch.bfloat16):
            decoded = self.student(encoded)
        return encoded, [d.float() for d in decoded]

    def forward(self, features: list[Tensor]) -> Tensor:
        """The loss: the sum over three layers of 1 - cosine, a scalar in 0..6.

        A layer of an image is one long vector, so a position counts by the norms of its features.
        [author] In the anomaly map all positions count alike; a loss that treats them alike, too,
        gave the same result within the spread of seeds.
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
        [ours] D4: with the mean alone, brightness drowns texture. align_corners=True is [author]:
        it puts the corner values of every layer on the corner pixels.
        """
        pooled = []
        for f in features:
            std, mean = torch.std_mean(f.float(), dim=(2, 3))  # (B, C) each
            pooled += [mean, std]

        encoded, decoded = self.decode(features)
        size = (self.size, self.size)
        maps = 0.0
        for e, d in zip(encoded, decoded):
            distance = 1 - F.cosine_similarity(e, d, dim=1)[:, None]  # (B, 1, h, w)
            full = F.interpolate(distance, size, mode="bilinear", align_corners=True)
            maps = maps + full[:, 0] / len(encoded)  # a mean over layers
        return torch.cat(pooled, dim=1), maps


# ---- CADA ----------------------------------------------------------------------------------------
# Take u and gamma of each normal map; learn to predict them from the features of the image; rescale
# maps by what is predicted. Nothing in this section knows of RevDist.

# Numbers of the regression and of the levels, chosen by trial on a few small sets. A level is a
# group of images for which the regression predicts nearly the same. [ours] D5, [ours] D6
COMPONENTS = 256  # principal components of the features that the regression reads
PENALTIES = np.logspace(-4, 2, 13)  # candidates for its ridge penalty
MOST_IMAGES = 4000  # that CADA learns from; memory grows with the square of this number
ROUNDS = 5  # of regressions: the first on the images' statistics, each later one on levels
WITHIN = 0.25  # levels merge while their mean variance is at most this; errors have 2 (1 a column)
LEAST_ERROR = 0.01  # a smaller error counts as this one: to alignment 1 % is as good as exact


def map_statistics(maps: Tensor) -> Tensor:
    """(N, H, W) -> (N, 2): u, the mean, and gamma, the maximum, of each map. gamma lies above u
    even for a map without contrast, since alignment divides by their difference."""
    u = maps.mean((1, 2))
    least = u + 1e-6 * u.abs().clamp(min=1)  # a millionth above u
    gamma = maps.amax((1, 2)).maximum(least)
    return torch.stack([u, gamma], dim=1)


def log_statistics(statistics: Tensor) -> Tensor:
    """(N, 2), u and gamma -> (N, 2), log u and log(gamma - u).

    Classes differ by factors, and a logarithm turns factors into differences. So maps must be above
    0, as distances are. A value below a thousandth of the median counts as that.
    """
    u, gamma = statistics.unbind(1)
    values = torch.stack([u, gamma - u], dim=1)
    least = values.median(0).values / 1000
    return values.maximum(least.clamp(min=1e-9)).log()


def direction(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pooled features (N, F) -> unit vectors (N, F). We standardise them, or the largest channels
    would decide alone; we clamp them, or one channel could; and we drop the length, which grows
    with the size of a defect. [ours] D4"""
    return F.normalize(((features.float() - mean) / std).clamp(-3, 3))


def fit_regression(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The regression, y = x weight + bias, from features (N, P) to logarithms (N, 2).

    That a regression predicts u and gamma is [paper]; that it is linear, with a penalty for each
    column of y, is [ours] D5. Returns weight (P, 2), bias (2,) and `unseen` (N, 2): what a fit on
    all other images predicts for each image (leave-one-out), by which the penalties are chosen.
    """
    ridge = RidgeCV(PENALTIES, alpha_per_target=True, scoring="neg_mean_squared_error",
                    store_cv_results=True)
    ridge.fit(x, y)
    chosen = np.searchsorted(PENALTIES, ridge.alpha_)  # (2,)
    # With a `scoring` given, cv_results_ holds leave-one-out predictions of y, (N, 2, penalties).
    # Take those of each column's penalty.
    unseen = ridge.cv_results_[:, [0, 1], chosen]
    return ridge.coef_.T, ridge.intercept_, unseen


def find_levels(unseen: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put images together that the regression hardly tells apart. [ours] D6

    unseen: its predictions (N, 2); y: the images' own log_statistics (N, 2). Returns the level of
    each image (N,), numbers from 0 on, and the regression's error (2,), a standard deviation.

    The error is measured against y in every round: later targets are easier to predict, so their
    error would shrink and cut the levels ever finer. Near duplicates, such as frames of a video,
    shrink it too: keep them out of the training images.
    """
    error = np.maximum((y - unseen).std(0), LEAST_ERROR)

    # Ward's method starts with a level for each image. Again and again it merges the two levels
    # whose union adds least to the squares within levels. Column 2, squared and halved, is what was
    # added.
    tree = ward(unseen / error)
    within = np.cumsum(tree[:, 2] ** 2 / 2) / len(y)  # the variance after each merger
    mergers = np.count_nonzero(within <= WITHIN)
    level = fcluster(tree, len(y) - mergers, "maxclust") - 1
    return level, error


def medians(values: Tensor, level: np.ndarray) -> Tensor:
    """(N, 2) and the level of each image (N,) -> (k, 2): the median of each level, because the few
    images that belong elsewhere do not move a median."""
    rows = [values[level == i].median(0).values for i in range(level.max() + 1)]
    return torch.stack(rows)


@dataclass
class CADA:
    """Predict (u, gamma), the mean and the maximum of anomaly maps of *normal* images of an image's
    class [paper], from its frozen features [ours] D4. gamma is the typical maximum of one map.

    The paper calls the predictor a regression. But a defect that moves the features moves what a
    regression predicts. So we let the prediction snap [ours] D6: on normal images the predictions
    crowd around levels, and an image gets the median statistics of the level that its prediction is
    nearest to. To do harm, a defect must move the prediction nearer to another level. And all
    images of a level keep their order.

    The regression learns in rounds. In the first its targets are the images' own statistics; then
    they are the medians of the levels, which pulls the images of a level together.

    CADA knows nothing of the detector. It needs pooled features, and maps above 0.
    """

    mean: Tensor  # (F,) of the training images' pooled features
    std: Tensor  # (F,) their standard deviation; infinite for a channel that says nothing
    first_weight: Tensor  # (F, 2) of the first round: the regression alone
    first_bias: Tensor  # (2,)
    weight: Tensor  # (F, 2) of the last round
    bias: Tensor  # (2,)
    error: Tensor  # (2,) standard deviation of the last round's errors on unseen images
    centres: Tensor  # (k, 2) of the levels: median predictions of log u and log(gamma - u)
    statistics: Tensor  # (k, 2): median u and median gamma of each level

    @classmethod
    def fit(cls, features: Tensor, statistics: Tensor, seed: int = 0) -> CADA:
        """Learn from 10 or more normal images, of which the seed draws MOST_IMAGES at most: pooled
        features (N, F) and map_statistics (N, 2) of raw maps, on the CPU. No label is used."""
        rows = np.random.default_rng(seed).permutation(len(features))[:MOST_IMAGES]
        features = features[rows].float()
        statistics = statistics[rows].double()
        mean = features.mean(0)
        std = features.std(0, correction=0)
        # Of a channel that hardly varies in training, a rounding error would be a huge deviation.
        std[std <= std.median() / 1000] = torch.inf
        x = direction(features, mean, std).double().numpy()
        pca = PCA(min(COMPONENTS, len(x) // 2, x.shape[1]), random_state=seed).fit(x)
        components = pca.components_.T  # (F, P)
        x = x @ components  # (N, P), not centred: the bias takes that up

        y = log_statistics(statistics).numpy()
        first_weight, first_bias, unseen = fit_regression(x, y)
        for _ in range(ROUNDS - 1):
            level, _ = find_levels(unseen, y)
            targets = log_statistics(medians(statistics, level)).numpy()  # (k, 2), of each level
            weight, bias, unseen = fit_regression(x, targets[level])
        level, error = find_levels(unseen, y)

        # Centres are medians of leave-one-out predictions: a new image is unseen, too.
        learned = {"first_weight": components @ first_weight, "first_bias": first_bias,
                   "weight": components @ weight, "bias": bias, "error": error,
                   "centres": medians(torch.from_numpy(unseen), level),
                   "statistics": medians(statistics, level)}
        learned = {name: torch.as_tensor(value).float() for name, value in learned.items()}
        return cls(mean, std, **learned)

    def regress(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """By the regression alone, the first round: (N, F) -> u (N,) and gamma (N,)."""
        logs = direction(features, self.mean, self.std) @ self.first_weight + self.first_bias
        u, contrast = logs.exp().unbind(1)
        return u, u + contrast

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, F) -> u (N,) and gamma (N,), gamma > u: those of the level whose centre is nearest to
        what the regression predicts, in units of its error."""
        logs = direction(features, self.mean, self.std) @ self.weight + self.bias
        difference = (logs[:, None] - self.centres) / self.error  # (N, k, 2)
        nearest = difference.square().sum(2).argmin(1)
        u, gamma = self.statistics[nearest].unbind(1)
        return u, gamma


def normalise(maps: Tensor, u: Tensor, gamma: Tensor) -> Tensor:
    """A' = (A - u) / (gamma - u), image by image: (N, H, W), (N,), (N,) -> (N, H, W). [author]

    0 is the mean of normal maps of the class and 1 their typical maximum, whatever the class is.
    About half of normal maps exceed 1 before the blur, and fewer after it.
    """
    u = u[:, None, None]
    gamma = gamma[:, None, None]
    return (maps - u) / (gamma - u)


# ==== shared: map and score
# These turn an anomaly map into one number an image, and many numbers into a threshold.

def smooth(maps: Tensor) -> Tensor:
    """Gaussian blur of (N, H, W) maps. Sigma is 4 pixels at 256 x 256 [author], where the kernel is
    cut to 5 x 5; here it is not cut, in proportion at other sizes, and edges repeat. [ours] D8

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


def conformal_threshold(scores: Tensor, quantile: float = 0.99) -> float:
    """The ceil((n + 1) quantile)-th smallest of the scores of n normal images, or the largest if
    there are fewer.

    A new normal image like these lies above it with a probability of at most 1 - quantile, if n is
    large enough (99 for 0.99) and nothing has learned from these n. (In cada.py CADA has, and the
    promise is a little weaker.) [ours] D9
    """
    n = len(scores)
    rank = min(math.ceil((n + 1) * quantile), n)  # the + 1 counts the new image among the n
    return scores.kthvalue(rank).values.item()
# ==== end shared


# ---- training ------------------------------------------------------------------------------------
# First the detector, then CADA on the detector as it is: so CADA can be added to one that was
# trained long ago. With torchrun several processes train together, each on its share of the images.

def build(cfg: Config, checkpoint: dict | None) -> nn.Module:
    """The detector on its device, with the weights of a checkpoint if there is one."""
    if cfg.cnc:
        return build_cnc(cfg, checkpoint)
    torch.manual_seed(cfg.seed)  # for the student's weights; the teacher draws apart
    detector = RevDist(cfg)
    if checkpoint:
        load_weights(detector, checkpoint)
    if detector.teacher.random:
        print("teacher: RANDOM weights; its numbers are not the paper's", file=sys.stderr)
    # channels_last is the layout of cuDNN's own convolutions.
    return detector.to(choose_device(cfg.device), memory_format=torch.channels_last)


def train(cfg: Config, detector: RevDist, samples: list[Sample], checkpoint: dict | None) -> dict:
    """Train on normal images, from where the checkpoint stopped if there is one. Returns the new
    checkpoint.

    Only the student learns: the teacher's features are computed without gradients, and its
    BatchNorm stays in eval mode; the student's BatchNorm learns its statistics here. All classes
    are mixed in every batch, and nobody tells the student which image is of which (model-unified).
    There is no validation and no best epoch, which only test images could choose: the last step
    counts.
    """
    start = checkpoint["step"] if checkpoint else 0
    if start >= cfg.iters:
        print(f"trained already: {start} steps", file=sys.stderr)
        return checkpoint
    # Every process reads all images, so that all have the same random teacher.
    if detector.teacher.random and start == 0:
        estimate_statistics(detector.teacher, image_batches(cfg, detector, samples))

    # Optimiser and schedule: [author], written for a sibling model. AMSGrad, which that code has
    # had since a month after the paper, changed nothing on the demo set.
    student = detector.student
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr, weight_decay=1e-5, fused=True)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    # Under torchrun the gradient is the mean over all processes. Their batches are equally large,
    # so this is the gradient of one large batch, if BatchNorm too sees all of it; on CPUs PyTorch
    # has no such BatchNorm, and each process normalises by its own share.
    engine = detector
    if WORLD_SIZE > 1:
        distributed.init_process_group()
        if next(student.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(student)  # in place, the parameters stay
        engine = nn.parallel.DistributedDataParallel(detector)

    share = samples[RANK::WORLD_SIZE]  # the images of this process
    batches = shuffled_batches(cfg, len(share), cfg.iters)
    features = teacher_features(cfg, detector, share, batches[start:])
    detector.train()
    bar = tqdm(features, "training", cfg.iters, initial=start, disable=None)
    for step, encoded in enumerate(bar, start + 1):
        # The rate follows from the step alone, so a resumed run needs no state of a scheduler.
        lr = cfg.lr
        if step > int(0.8 * cfg.iters):
            lr = 0.2 * cfg.lr
        optimizer.param_groups[0]["lr"] = lr

        loss = engine(encoded)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        if step % 20 == 0:  # seldom: item() waits for the GPU
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if step % max(1, cfg.iters // 10) == 0 or step == cfg.iters:  # about ten times
            checkpoint = {"step": step, "optimizer": optimizer.state_dict()}
            save_checkpoint(cfg, detector, samples, checkpoint)

    if WORLD_SIZE > 1:
        distributed.destroy_process_group()
    return checkpoint


# ---- calibration and evaluation ------------------------------------------------------------------

def calibrate(cfg: Config, detector: nn.Module, normal: list[Sample], held: list[int]) -> dict:
    """Fit CADA to a trained detector, and take the thresholds from the normal images `held`.
    Returns what the checkpoint keeps of it.

    CADA learns from all normal images, those held out for the threshold included. Without them it
    would know only maps of images that the detector was trained on; an earlier form lost a point of
    pooled I-AUROC on CNC by that. With them the promise of the threshold is a little weaker where
    classes are small.
    """
    # Of each map three numbers are kept: all maps of VisA would take gigabytes.
    parts = [(pooled, map_statistics(maps), image_score(smooth(maps)))
             for pooled, maps in describe_images(cfg, detector, normal)]
    features, statistics, raw = map(torch.cat, zip(*parts))  # (N, F), (N, 2), (N,)

    cada = CADA.fit(features, statistics, cfg.seed)
    # The oracle, our reading of Fig. 4(a) [ours] D7, knows labels: class means over these images.
    # CADA reads no label.
    classes = np.array([s.cls for s in normal])
    oracle = {str(c): statistics[classes == c].mean(0) for c in np.unique(classes)}

    # Scores and means of maps are aligned like the maps themselves, since means commute with it.
    u, gamma = cada.predict(features[held])
    aligned = (raw[held] - u) / (gamma - u)
    means = statistics[held, 0]
    aligned_means = (means - u) / (gamma - u)
    return {
        "cada": asdict(cada), "oracle": oracle,
        "thresholds": {"raw": conformal_threshold(raw[held]), "cada": conformal_threshold(aligned)},
        "means": {"raw": means.mean().item(), "cada": aligned_means.mean().item()}}


def aligned_maps(raw: Tensor, features: Tensor, samples: list[Sample],
                 checkpoint: dict) -> Iterator[tuple[str, Tensor]]:
    """Yield the smoothed raw maps (N, S, S) of samples in four variants: "raw", as they are;
    "oracle", aligned by the statistics of the true class, if the checkpoint knows all these
    classes; "regress", aligned by the regression alone; "cada", aligned by CADA.

    What to look for: "pooled" should rise from raw to cada, and "class mean" should not fall. Where
    it falls, the prediction has taken defects for classes, and does harm. The oracle knows the
    class but not the image, so a prediction for each image can be better.
    """
    yield "raw", raw
    oracle = checkpoint["oracle"]
    if all(s.cls in oracle for s in samples):
        u, gamma = torch.stack([oracle[s.cls] for s in samples]).unbind(1)
        yield "oracle", normalise(raw, u, gamma)
    cada = CADA(**checkpoint["cada"])
    yield "regress", normalise(raw, *cada.regress(features))
    yield "cada", normalise(raw, *cada.predict(features))


def evaluate(cfg: Config, detector: nn.Module, test: list[Sample], checkpoint: dict) -> None:
    """Report how well each variant tells good from defective test images."""
    # Blurred once for all variants, since aligning commutes with blurring.
    parts = [(pooled, smooth(maps)) for pooled, maps in describe_images(cfg, detector, test)]
    features, raw = map(torch.cat, zip(*parts))  # (N, F), (N, S, S)
    variants = aligned_maps(raw, features, test, checkpoint)
    scores, results = report(cfg, test, detector.size, variants, "cada", checkpoint)
    plot_distributions(cfg, test, scores, results, checkpoint["thresholds"])


def plot_distributions(cfg: Config, samples: list[Sample], scores: dict, results: dict,
                       thresholds: dict) -> None:
    """Draw one tick an image: scores by class, normal images above and anomalous ones below the
    line of their class; a panel for each variant that has a threshold.

    Where the normal scores of all classes end at the same place, one threshold serves them all.
    """
    labels = np.array([s.label for s in samples])
    names, line = np.unique([s.cls for s in samples], return_inverse=True)
    # The colours are Okabe and Ito's, which colour-blind readers tell apart too.
    colours = np.where(labels == 1, "#D55E00", "#0072B2")
    figure = Figure(figsize=(12, 1.8 + 0.5 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(thresholds), sharey=True, squeeze=False)[0]
    for ax, (variant, threshold) in zip(panels, thresholds.items()):
        ax.scatter(scores[variant], line + 0.4 * labels - 0.2, 150, colours, marker="|", alpha=0.7)
        ax.axvline(threshold, color="black", linestyle="--")
        auroc = results[variant]["pooled"].get("I-AUROC", math.nan)
        ax.set_title(f"{variant}: pooled I-AUROC {auroc:.1%}")
    panels[0].set_ylim(len(names) - 0.5, -0.5)  # of both panels; downwards
    panels[0].set_yticks(range(len(names)), [name[:14] for name in names], parse_math=False)
    figure.supxlabel("image score; blue: normal, orange: anomalous, dashed: threshold")
    figure.savefig(Path(cfg.out, "distributions.png"), dpi=150)


# ---- the script ----------------------------------------------------------------------------------

def run(argv: list[str] | None) -> None:
    """The whole story: load, train, calibrate, evaluate; or load and predict."""
    cfg, checkpoint = read_command_line(argv)
    if cfg.cnc and not checkpoint:
        checkpoint = adopt_cnc(cfg)

    if cfg.command == "predict":
        samples, broken = images_to_score(cfg)
        detector = build(cfg, checkpoint)
        cada = CADA(**checkpoint["cada"])
        maps = (normalise(smooth(raw), *cada.predict(pooled))
                for pooled, raw in describe_images(cfg, detector, samples))
        write_predictions(cfg, samples, maps, checkpoint["means"]["cada"],
                          checkpoint["thresholds"]["cada"])
        if broken:
            raise UserError(f"{len(broken)} images not scored, {broken[0]} the first")
        return

    normal, test = read_dataset(Path(cfg.data), cfg.command == "train")
    detector = build(cfg, checkpoint)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    if cfg.command == "train":
        kept, held = hold_out(cfg, normal, checkpoint)
        samples = [normal[i] for i in kept]
        if not cfg.cnc:
            checkpoint = train(cfg, detector, samples, checkpoint)
        if RANK > 0:  # of torchrun's processes only the first evaluates and writes
            return
        checkpoint = checkpoint | calibrate(cfg, detector, normal, held)
        save_checkpoint(cfg, detector, samples, checkpoint)
    if test:
        evaluate(cfg, detector, test, checkpoint)
    else:
        print("no test images, so nothing to evaluate; threshold "
              f"{checkpoint['thresholds']['cada']:.4f}")


# ---- Appendix: what any such script needs --------------------------------------------------------
# One who reads for the paper may stop here. First what only this script needs: a random teacher's
# statistics, and CADA on a CNC in place of RevDist.

def estimate_statistics(teacher: Teacher, batches: Iterable) -> None:
    """Give a random teacher the BatchNorm statistics of the training images. [ours] D1

    Fresh statistics (mean 0, variance 1) let the activations of a random ResNet drift from layer to
    layer, until all images look alike.
    """
    # A container of its own, since Teacher.train never leaves eval mode. update_bn is PyTorch's own
    # plain mean over all batches. It runs the layers in train mode, and puts them back.
    layers = nn.Sequential(teacher.stem, teacher.layer1, teacher.layer2, teacher.layer3).eval()
    torch.optim.swa_utils.update_bn(batches, layers)


def adopt_cnc(cfg: Config) -> dict:
    """The checkpoint of cnc.py that --cnc names, as the start of one of ours. Seed, held-out share
    and weights become CNC's, so that the images kept back are those that CNC has not seen. Raises
    UserError if there is none, or its training has not finished."""
    checkpoint = read_checkpoint(cfg.cnc, "cnc.py")
    if not checkpoint["thresholds"]:
        raise UserError(f"--cnc {cfg.cnc}: its training has not finished; --resume it by cnc.py")
    checkpoint["cnc"] = checkpoint["config"]
    checkpoint["optimizer"] = None  # CNC learns no more
    cfg.seed = checkpoint["cnc"]["seed"]
    cfg.holdout = checkpoint["cnc"]["holdout"]
    cfg.weights = checkpoint["cnc"]["weights"]
    if cfg.out == Config.out:  # that is RevDist's
        cfg.out = "runs/cada-on-cnc"
    return checkpoint


def build_cnc(cfg: Config, checkpoint: dict) -> nn.Module:
    """The CNC of a checkpoint that adopt_cnc began."""
    import cnc  # only here: to read and run RevDist, this file is enough
    settings = checkpoint["cnc"] | {"device": cfg.device, "weights": cfg.weights}
    try:
        return cnc.build(cnc.Config(**settings), checkpoint)
    except cnc.UserError as e:
        raise UserError(str(e))


# ==== shared: features and checkpoint
# What training needs besides a model: images kept back, batches in a fixed order, features that are
# computed once, and a checkpoint.

def hold_out(cfg: Config, samples: list, checkpoint: dict | None) -> tuple[list, list]:
    """Indices of the normal images to train on, and of those kept back at random for the threshold,
    because the decoder knows its training images too well. With --holdout 0 both are all images,
    and the threshold comes out too low. [ours] D9

    Raises UserError if a checkpoint was trained on other images: it may have been trained on images
    that are kept back now.
    """
    kept = held = list(range(len(samples)))
    if cfg.holdout > 0:
        kept, held = train_test_split(kept, test_size=cfg.holdout, random_state=cfg.seed)
    if checkpoint and checkpoint["images"] != names_in_data(cfg, [samples[i] for i in kept]):
        raise UserError(f"--data {cfg.data}: these are not the training images of the checkpoint; "
                        "give the folder that it was trained on, or train anew")
    if len(kept) < WORLD_SIZE:
        raise UserError(f"torchrun: {WORLD_SIZE} processes for {len(kept)} training images")
    if len(held) < 99:
        print("threshold: the highest score of", len(held), "normal images; for at most 1 % of "
              "false alarms it takes 99", file=sys.stderr)
    return kept, held


def names_in_data(cfg: Config, samples: list) -> list:
    """The samples' paths within the data set, which may have moved."""
    return [str(s.path.relative_to(cfg.data)) for s in samples]


def shuffled_batches(cfg: Config, n: int, steps: int) -> list:
    """The batches of a whole training run as lists of indices below n, epoch after epoch. They
    follow from the settings, so a resumed run goes on with the batches that it would have had."""
    size = cfg.batch_size // WORLD_SIZE
    # Each process of torchrun has an order of its own: with --holdout 0 neighbours are of one
    # class, and one order for all processes would fill a step with it.
    generator = torch.Generator().manual_seed(cfg.seed + RANK)
    order = []  # a batch may take the last images of an epoch and the first ones of the next
    while len(order) < steps * size:
        order += torch.randperm(n, generator=generator).tolist()
    return [order[i * size:(i + 1) * size] for i in range(steps)]


def teacher_features(cfg: Config, detector: nn.Module, samples: list, batches: list) -> Iterator:
    """Yield the teacher's features of each batch, a list of indices of samples. They are computed
    once [ours] D2, or with --no-cache anew for every batch.

    Training uses no augmentation, so every epoch would compute the same again. Each of the three
    features stays as one float16 array (N, ...) in an unnamed file in --out; the system keeps in
    memory what fits. The files disappear with the process, even a killed one. Raises UserError if
    the disk is full.
    """
    if not cfg.cache:
        for x in image_batches(cfg, detector, samples, batches):
            yield detector.teacher(x)
        return

    # Written first and mapped into memory afterwards: on a full disk a plain write raises an error,
    # and a write through the map would kill the process.
    files = [tempfile.TemporaryFile(dir=cfg.out) for _ in range(3)]
    for x in image_batches(cfg, detector, samples):
        features = detector.teacher(x)
        for file, f in zip(files, features):
            try:
                f.cpu().contiguous().numpy().tofile(file)
            except OSError as e:
                raise UserError(f"no room in --out for the cache: {e}; use --no-cache")
    arrays = []
    for file, f in zip(files, features):  # f is of the last batch; only its first size differs
        shape = (len(samples), *f.shape[1:])
        arrays.append(np.memmap(file, np.float16, "r", shape=shape))
    for rows in batches:
        yield [torch.from_numpy(array[rows]).to(x.device) for array in arrays]


@torch.no_grad()
def describe_images(cfg: Config, detector: nn.Module, samples: list) -> Iterator:
    """Yield pooled features (B, F) and raw anomaly maps (B, S, S) of the samples, batch by batch,
    on the CPU. Raises UserError for a map that is not finite: no comparison with it would mean
    anything."""
    detector.eval()  # no dropout, BatchNorm frozen: a score must not depend on chance or its batch
    for x in image_batches(cfg, detector, samples):
        pooled, maps = detector.describe(detector.teacher(x))
        if not maps.isfinite().all():
            raise UserError("an anomaly map is not finite; train again with a lower --lr")
        yield pooled.cpu(), maps.cpu()


def save_checkpoint(cfg: Config, detector: nn.Module, samples: list, checkpoint: dict) -> None:
    """Write checkpoint.pt, whole or not at all, and remove the tables and pictures of an earlier
    run from --out. A checkpoint holds plain values and tensors:

        script, config     who wrote it, with which settings
        weights            a state_dict for each part of the detector; of a trained teacher only a
                           fingerprint, since its own file holds the rest
        images             what it was trained on: names of the samples
        step, optimizer    to go on from
        thresholds, means  by variant, see calibrate; {} before the training is finished
        and of cada.py     cada, oracle; cnc, the settings of CNC if that is the detector

    Raises UserError for weights that are not finite, and if the file cannot be written.
    """
    if RANK > 0:  # of torchrun's processes only the first writes
        return
    weights = {name: part.state_dict() for name, part in detector.named_children()}
    if not detector.teacher.random:
        weights["teacher"] = fingerprint(detector.teacher)
    if not all(w.isfinite().all() for w in weights["student"].values()):
        raise UserError("the training diverged, its weights are not finite; give a lower --lr")
    content = {"thresholds": {}, "means": {}} | checkpoint | {
        "script": SCRIPT, "config": asdict(cfg), "weights": weights,
        "images": names_in_data(cfg, samples)}

    path = Path(cfg.out, "checkpoint.pt")
    unfinished = path.with_suffix(".partial")
    try:
        torch.save(content, unfinished)
    except RuntimeError as e:  # torch's, on a full disk for instance
        unfinished.unlink(missing_ok=True)
        raise UserError(f"no checkpoint could be written to --out: {e}; is there room?")
    os.replace(unfinished, path)  # in one go, by the system
    for name in RESULTS:
        Path(cfg.out, name).unlink(missing_ok=True)


def read_checkpoint(path: str | Path, script: str) -> dict:
    """A checkpoint that `script` wrote. Raises UserError if it is none."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] == script:
            return checkpoint
        reason = f"{checkpoint['script']} wrote it"
    except Exception as e:  # no such file, no checkpoint, a malicious one: many kinds
        reason = str(e)[:100]
    raise UserError(f"{path} is no checkpoint of {script}: {reason}; name one, or train first")


def fingerprint(module: nn.Module) -> float:
    """It tells whether a file or a download still holds the weights that it held in training."""
    return sum(w.double().abs().sum().item() for w in module.state_dict().values())


def load_weights(detector: nn.Module, checkpoint: dict) -> None:
    """Put the weights of a checkpoint into the detector. Raises UserError if its trained teacher
    is not the one that the checkpoint was trained with."""
    for name, part in detector.named_children():  # teacher, student, ...
        weights = checkpoint["weights"][name]
        stored = isinstance(weights, dict)  # else it is a fingerprint
        another = not stored and not math.isclose(weights, fingerprint(part), rel_tol=1e-6)
        if another or name == "teacher" and stored != part.random:
            raise UserError("--weights: not the teacher of the training; give the same weights")
        if stored:
            part.load_state_dict(weights)
# ==== end shared


# ==== shared: data
# Two layouts are read: that of MVTec AD, which most data sets of the field have been converted to,
# and VisA's own archive. Labels come from folders or from VisA's list, never from masks.

SUFFIXES = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
GOOD = ("good", "ok", "normal")  # folders of normal images, in upper or lower case


@dataclass(frozen=True)
class Sample:
    """One image of a data set. No model sees its class `cls`, which serves the report and, in
    cada.py, the oracle."""

    path: Path
    cls: str = ""
    label: int = 0  # 1 is anomalous; from the folder name, since a small defect may lose its mask
    mask: Path | None = None


def files_in(folder: Path, pattern: str) -> list:
    """The files that match, in name order, without hidden ones. A * follows links to folders, and
    ** does not."""
    files = [path for path in sorted(folder.glob(pattern)) if not path.is_dir()]
    return [path for path in files if "/." not in f"/{path.relative_to(folder).as_posix()}"]


def is_image(path: Path) -> bool:
    """Whether Pillow knows files of this type."""
    return path.suffix.lower() in SUFFIXES


def read_dataset(root: Path, training: bool = True) -> tuple[list, list]:
    """(train, test) samples of a data set; what was found is printed. Without training there need
    be no training images, and they are not opened.

    Every file is decoded once: a broken one must stop the run before the training and not after.
    Raises UserError that says what is wrong.
    """
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder; give its place, also if it has moved")
    visa = (root / "split_csv/1cls.csv").is_file()
    train, test = read_visa(root) if visa else read_mvtec(root)
    classes = {s.cls for s in train}
    samples = train + test if training else test
    if not samples:
        raise UserError(f"--data {root}: no images in <class>/train/good and <class>/test/<kind>")
    if training and len(train) < 10:  # CADA needs some, and a mistake in the path is more likely
        raise UserError(f"--data {root}: {len(train)} training images; put 10 or more normal ones "
                        "into <class>/train/good")
    for s in samples:
        if training and s.cls not in classes:
            raise UserError(f"--data {root}: no training images of {s.cls}; put normal ones into "
                            "<class>/train/good, and not into folders below")
    with ThreadPoolExecutor() as pool:  # threads suffice: Pillow decodes without Python's lock
        checks = pool.map(check_files, samples)
        marked = list(tqdm(checks, "checking images", len(samples), leave=False, disable=None))

    # Most of what can go wrong with a data set shows in this line.
    masks = {s.mask for s in test if s.mask}
    used = {s.path for s in train + test} | masks
    unused = [path for path in files_in(root, "**/*") if path not in used]
    print(f"{root}: {len(classes)} classes, {len(train)} training and {len(test)} test images, "
          f"{sum(s.label for s in test)} of them defective, {sum(marked)} with a mask; "
          f"{len(unused)} files not used", *unused[:1], file=sys.stderr)
    # Else the metrics of pixels would be missing, and nobody would notice.
    if not any(marked) and any("ground_truth" in path.parts for path in [*masks, *unused]):
        raise UserError(f"--data {root}: no mask in ground_truth marks anything on a test image; "
                        "arrange masks as in data/README.md, or remove all ground_truth")
    return train, test


def read_mvtec(root: Path) -> tuple[list, list]:
    """Read an MVTec-style tree, <class>/{train/good,test/<kind>,ground_truth/<kind>}/*, or the
    folder of a single class.

    The mask of 000.png is 000_mask or 000, with any suffix: names decide, never sort order. A set
    may have no masks at all, but if it has some, each defective image needs one. Raises UserError
    where it is missing, or where two files share their name.
    """
    single = (root / "train").is_dir() or (root / "test").is_dir()
    found = {"train": {}, "test": {}, "ground_truth": {}}
    for path in filter(is_image, files_in(root, "*/*/*" if single else "*/*/*/*")):
        cls, part, kind, _ = path.parts[-4:]  # of a single class cls is the root's name
        name = (cls, kind, path.stem.removesuffix("_mask"))
        if part not in found or part == "train" and kind.lower() not in GOOD:
            continue
        if name in found[part]:
            raise UserError(f"{path} shares its name with {found[part][name]}; rename one, and "
                            "keep masks in ground_truth, one an image")
        found[part][name] = path

    masks = found["ground_truth"]
    samples = {"train": [], "test": []}
    for part in samples:
        for (cls, kind, name), path in found[part].items():
            label = int(kind.lower() not in GOOD)
            mask = masks.get((cls, kind, name)) if label else None
            if label and masks and not mask:
                raise UserError(f"no mask in {root}/.../ground_truth/{kind} for {path}; add it, "
                                "remove all ground_truth, or call a folder good")
            samples[part].append(Sample(path, cls, label, mask))
    return samples["train"], samples["test"]


def read_visa(root: Path) -> tuple[list, list]:
    """Read the raw VisA archive by its own split file, with columns object, split, label, image and
    mask. Raises UserError if that file is not VisA's."""
    path = root / "split_csv/1cls.csv"
    samples = {"train": [], "test": []}
    try:
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            label = int(row["label"].lower() != "normal")
            mask = root / row["mask"] if label else None
            samples[row["split"]].append(Sample(root / row["image"], row["object"], label, mask))
        samples["train"][0]  # an empty list is not VisA's
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        raise UserError(f"{path}: {e!r}; take VisA's own list, in UTF-8, with commas between its "
                        "columns object, split, label, image and mask")
    return samples["train"], samples["test"]


def check_files(sample: Sample) -> bool:
    """Whether the sample has a mask that marks something. Raises UserError if image or mask cannot
    be read, or if the mask does not lie on the image."""
    image = load_image(sample.path)
    if not sample.mask:
        return False
    mask = load_mask(sample.mask)
    with Image.open(sample.path) as file:
        turned = file.getexif().get(ExifTags.Base.Orientation, 1) > 1
    if turned or mask.size != image.size:
        raise UserError(f"mask {sample.mask}: its image has another size, or an EXIF orientation "
                        "that turns it; save both upright and equally large")
    return mask.getbbox() is not None


def open_image(path: Path) -> Image.Image:
    """An image file, decoded and upright. Raises UserError if it cannot be read, or holds several
    images: which one is meant?"""
    try:
        with Image.open(path) as file:
            frames = getattr(file, "n_frames", 1)
            image = ImageOps.exif_transpose(file)
    except Exception as e:  # Pillow's readers raise many kinds for a broken file
        raise UserError(f"cannot read image {path}: {e}; repair, convert or remove it")
    if frames > 1 and file.format != "MPO":  # a phone's MPO is one photograph
        raise UserError(f"{path}: has {frames} pages or frames; save each as a file of its own")
    return image


def load_image(path: Path) -> Image.Image:
    """Any image file of 8 or 16 bits a channel as 8-bit RGB. Raises UserError if it cannot be read,
    has more bits, or is nearly black."""
    image = open_image(path)
    if image.mode in ("I", "F"):
        raise UserError(f"{path}: has 32 bits a pixel; convert it to 8 or 16")
    if image.mode.startswith("I;16"):  # convert() would clip it
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    image = image.convert("RGB")
    brightest = np.max(image.getextrema())
    if brightest <= 16:  # 12 bits in 16 reach 4095 / 257, rounded 16
        raise UserError(f"{path}: is nearly black, its brightest value is {brightest} of 255; "
                        "stretch its values, or remove it")
    return image


def load_mask(path: Path) -> Image.Image:
    """A mask as a black and white image. Raises UserError if it cannot be read.

    Every value above 0 is defective: VisA's masks hold 1 to 9, others the colours of a palette. But
    if a mask without a palette has values above 127, as MVTec AD's have, only those count: blur and
    JPEG leave small ones. A colour counts by its brightest channel, and what is transparent is
    black. [ours] D10
    """
    image = open_image(path)
    rgba = np.asarray(image.convert("RGBA"))  # (height, width, 4)
    values = rgba[..., :3].max(2) * (rgba[..., 3] / np.float32(255))
    limit = 0
    if values.max() > 127 and image.mode != "P":
        limit = 127
    return Image.fromarray(values > limit)


def load_masks(samples: list, size: int) -> np.ndarray:
    """Ground truth as bool (N, size, size). Where there is no mask, nothing is marked.

    Binarised first and resized (nearest neighbour) after it: the other way round thin defects blur.
    """
    masks = np.zeros((len(samples), size, size), bool)
    for i, s in enumerate(samples):
        if s.mask:
            masks[i] = load_mask(s.mask).resize((size, size), Image.NEAREST)
    return masks


@dataclass
class Images(Dataset):
    """The samples as preprocessed images, uint8 (3, S, S) each. uint8 takes a quarter of float32's
    shared memory, and a container has little."""

    preprocess: Compose
    samples: list

    def __getitem__(self, i: int) -> Tensor:
        return self.preprocess(load_image(self.samples[i].path))


def image_batches(cfg: Config, detector: nn.Module, samples: list,
                  batches: list | None = None) -> Iterator:
    """Yield standardised images (B, 3, S, S) on the detector's device: these batches of indices, or
    if there are none all samples in order."""
    if batches is None:
        batches = [rows.tolist() for rows in torch.arange(len(samples)).split(cfg.batch_size)]
    workers = min(cfg.workers, os.cpu_count() or 1)
    if len(batches) == 1:  # to start a process would take longer
        workers = 0
    images = Images(detector.preprocess, samples)
    loader = DataLoader(images, batch_sampler=batches, num_workers=workers)
    device = next(detector.parameters()).device
    for x in tqdm(loader, "images", leave=False, disable=None):
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

    Exact: every distinct score is a threshold. But the true-positive rate changes only at scores of
    positives, and few pixels are positive. So each distinct score of a positive gives two points of
    the ROC curve, one with the threshold just above it and one with the threshold at it, and all
    that lies between is straight. Four images, positives scored 9 and 4, negatives 6 and 1:

        threshold     9   4
        tp_above      0   1     positives above it
        tp            1   2     ... or at it
        fp_above      0   1     negatives above it
        fp            0   1     ... or at it

        ROC: (0, 0), (0, 1/2), (1/2, 1/2), (1/2, 1), (1, 1), an area of 3/4;
        AP: 1/2 of the positives at a precision of 1/1, 1/2 at 2/3, together 5/6;
        F1max: 4/5, at 4.
    """
    positives = np.sort(scores[positive])
    negatives = np.sort(scores[~positive])
    if not len(positives) or not len(negatives):
        return {}
    thresholds = np.unique(positives)[::-1]
    tp_above = len(positives) - np.searchsorted(positives, thresholds, side="right")
    tp = len(positives) - np.searchsorted(positives, thresholds, side="left")
    fp_above = len(negatives) - np.searchsorted(negatives, thresholds, side="right")
    fp = len(negatives) - np.searchsorted(negatives, thresholds, side="left")

    def curve(above: np.ndarray, at: np.ndarray) -> np.ndarray:
        """(K,), (K,) -> (2K + 2,): both points of each threshold, between the corners 0 and 1."""
        return np.concatenate([[0], np.stack([above, at], axis=1).ravel(), [1]])

    fpr = curve(fp_above / len(negatives), fp / len(negatives))
    tpr = curve(tp_above / len(positives), tp / len(positives))
    recall_gained = (tp - tp_above) / len(positives)
    precision = tp / (tp + fp)
    metrics = {f"{kind}-AUROC": area_under(fpr, tpr),
               f"{kind}-AP": float(np.sum(recall_gained * precision)),
               f"{kind}-F1max": float(np.max(2 * tp / (tp + fp + len(positives))))}
    if kind == "P":
        overlap = region_overlap(scores, positive)
        metrics["AUPRO"] = area_under(fpr, curve(overlap[tp_above], overlap[tp]), 0.3)
    return metrics


def region_overlap(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """For AUPRO: the share of a region that the k highest positives cover, averaged over the
    8-connected regions, for k = 0, 1, ... all.

    A mean over regions of (pixels found / area) is a sum over found pixels of 1 / (area of the
    pixel's region), divided by the number of regions: so one sort serves all thresholds.
    """
    neighbours = np.zeros((3, 3, 3))
    neighbours[1] = 1  # the 8 around a pixel, and none in another image
    regions, number = ndimage.label(positive, neighbours)
    region = regions[positive]  # the region that each positive is in
    weight = 1 / np.bincount(region)[region]
    highest_first = np.argsort(scores[positive])[::-1]
    return np.append(0, weight[highest_first].cumsum()) / number


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


# ==== shared: report and predictions
# The table comes first: no picture that fails may cost the numbers.

RESULTS = ("scores.csv", "metrics.json", "heatmaps.png", "distributions.png")
OVERLAY = ".overlay.png"
OURS = ("checkpoint.pt", *RESULTS)


def report(cfg: Config, samples: list, size: int, variants: Iterable, decides: str,
           checkpoint: dict) -> tuple[dict, dict]:
    """Print and write how well the maps of some variants tell good from defective samples. Returns
    image scores (N,) and metrics, both by variant.

    variants: an iterator of pairs, a name and maps (N, size, size), so that few maps are in memory
    at once; `decides` names the one whose threshold flags images. No threshold comes from test
    labels; only F1max says what the best one would have been.
    """
    labels = np.array([s.label for s in samples])
    classes = np.array([s.cls for s in samples])
    masks = load_masks(samples, size)
    # heatmaps.png shows the last good and the last defective image of each class, 24 at most.
    last = {(s.cls, s.label): i for i, s in enumerate(samples)}
    shown = [last[key] for key in sorted(last)][:24]
    scores = {}
    results = {}
    pictures = {}
    for variant, maps in variants:
        scores[variant] = image_score(maps).numpy()
        results[variant] = summarise(scores[variant], labels, classes, maps.numpy(), masks)
        pictures[variant] = maps[shown]

    if results[decides]["pooled"]:
        print_table(results)
    else:
        print("no table: metrics compare good with defective images, and one kind is missing")
    threshold = checkpoint["thresholds"][decides]
    flagged = scores[decides] > threshold
    good = flagged[labels == 0]  # these should be False
    bad = flagged[labels == 1]  # and these True
    print(f"threshold {threshold:.4f}: flags {good.sum()} of {len(good)} good and "
          f"{bad.sum()} of {len(bad)} defective test images; more in {cfg.out}")
    with open(Path(cfg.out, "scores.csv"), "w", newline="", encoding="utf-8",
              errors="surrogateescape") as file:  # names that are no UTF-8, as the system has them
        writer = csv.writer(file)
        writer.writerow(["path", "class", "label", "anomalous", *scores])
        for s, is_flagged, *values in zip(samples, flagged, *scores.values()):
            writer.writerow([s.path, s.cls, s.label, is_flagged, *values])
    # Everything needed to quote a number: settings, thresholds, metrics in 0..1.
    content = {"config": asdict(cfg), "cnc": checkpoint.get("cnc"),
               "thresholds": checkpoint["thresholds"], "results": results}
    Path(cfg.out, "metrics.json").write_text(json.dumps(content, indent=2))
    plot_heatmaps(cfg, [samples[i] for i in shown], masks[shown], pictures, checkpoint)
    return scores, results


def print_table(results: dict) -> None:
    """A line for each class, the class mean and the pooled metrics, of each variant; in %."""
    parts = next(iter(results.values()))  # all variants have the same
    names = list(parts["pooled"])
    width = max(map(len, parts))
    print(" " * (width + 9), *[f"{name:>9}" for name in names], sep="")
    for part in parts:
        for variant in results:
            found = results[variant][part]
            values = [f"{100 * found.get(name, math.nan):9.1f}" for name in names]
            print(f"{part:<{width}}  {variant:<7}", *values, sep="")


def heat(maps: Tensor, mean: float, threshold: float) -> np.ndarray:
    """Maps -> 0..1 by one fixed scale: 0 at the mean of normal maps, 1 at twice the threshold. To
    scale each image by itself would paint good images in the colours of defects."""
    return ((maps - mean) / (2 * threshold - mean)).clamp(0, 1).numpy()


def plot_heatmaps(cfg: Config, samples: list, masks: np.ndarray, pictures: dict,
                  checkpoint: dict) -> None:
    """Each column shows one image, its ground truth, and its map by each variant that has a
    threshold."""
    size = masks.shape[-1]
    rows = {"image": [load_image(s.path).resize((size, size)) for s in samples],
            "ground truth": masks}
    for variant, threshold in checkpoint["thresholds"].items():
        rows[f"{variant} map"] = heat(pictures[variant], checkpoint["means"][variant], threshold)

    inches = (1.1 * len(samples) + 2, 1.1 * len(rows) + 0.5)
    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.subplots(len(rows))
    for ax, (name, images) in zip(axes, rows.items()):
        ax.imshow(np.hstack(images), "inferno", vmin=0, vmax=1)
        ax.vlines(size * np.arange(1, len(samples)), 0, size, "white", linewidth=3)
        ax.set(xticks=[], yticks=[size / 2], yticklabels=[name], frame_on=False)
        ax.tick_params(length=0)
    titles = [f"{s.cls[:14]}\n{('good', 'defective')[s.label]}" for s in samples]
    axes[0].set_xticks(size * (np.arange(len(samples)) + 0.5), titles, parse_math=False)
    axes[0].xaxis.tick_top()
    figure.savefig(Path(cfg.out, "heatmaps.png"), dpi=150, bbox_inches="tight")


def images_to_score(cfg: Config) -> tuple[list, list]:
    """What predict is to score, and the images that it cannot read, each of which is reported. From
    a folder, every file that Pillow can read is taken, except for our own results. Raises
    UserError if there is nothing to score."""
    files = []
    for place in map(Path, cfg.paths):
        if place.is_dir():
            found = files_in(place, "**/*")
            files += [p for p in found if p.name not in OURS and not p.name.endswith(OVERLAY)]
        else:
            files.append(place)
    others = [path for path in files if not is_image(path)]
    if others:
        print(len(others), "files that Pillow does not read as images:", others[0], "...",
              file=sys.stderr)
    samples = []
    broken = []
    for path in filter(is_image, files):
        try:
            load_image(path)
            samples.append(Sample(path))
        except UserError as e:
            print(e, file=sys.stderr)
            broken.append(path)
    if not samples:
        raise UserError(f"no image can be scored in {', '.join(cfg.paths)}; name some")
    return samples, broken


def write_predictions(cfg: Config, samples: list, batches: Iterable, mean: float,
                      threshold: float) -> None:
    """For each sample a line of JSON, and the image with its map on it: clear where the map is as
    low as normal ones are on average, and hottest from twice the threshold on. batches: maps
    (B, S, S), computed as they are needed."""
    folder = Path(cfg.out, "predict")
    folder.mkdir(parents=True, exist_ok=True)
    maps = (amap for batch in batches for amap in batch)
    for number, (sample, amap) in enumerate(zip(samples, maps)):
        score = image_score(amap[None]).item()
        values = heat(amap, mean, threshold)
        # (S, S, 4): the colder, the more transparent
        colours = colormaps["inferno"](values, alpha=0.8 * values, bytes=True)
        image = load_image(sample.path)
        overlay = Image.fromarray(colours).resize(image.size)
        image.paste(overlay, mask=overlay)
        # A name may have 255 bytes at most. By its suffix the next run knows that it is ours.
        target = folder / f"{number:04}-{sample.path.stem[:50]}{OVERLAY}"
        image.save(target)
        print(json.dumps({"path": str(sample.path), "score": score, "threshold": threshold,
                          "anomalous": score > threshold, "overlay": str(target)}))
# ==== end shared


# ==== shared: command line and device
# Settings, checkpoint, device: all that is decided before the first image is read.

SCRIPT = Path(__file__).name
HERE = Path(__file__).resolve().parent
# torchrun says which of its processes this is, and of how many. Clusters set the same variables for
# other purposes, so they count only under torchrun.
UNDER_TORCHRUN = distributed.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if UNDER_TORCHRUN else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if UNDER_TORCHRUN else 1

# Settings that eval, predict and --resume may change. With another value of any other setting, the
# checkpoint would not fit, or not mean the same.
FREE = ("command", "paths", "data", "out", "device", "weights", "iters", "epochs", "lr", "cache",
        "workers", "checkpoint", "resume")


class UserError(Exception):
    """A mistake that the user can mend. main() prints its one line and ends with exit code 2."""


def read_command_line(argv: list | None) -> tuple[Config, dict | None]:
    """The settings, and the checkpoint if one is to be read. Raises UserError if it cannot be, or
    for settings that are impossible.

    tyro makes a flag of each field of Config, and its help of the comment beside it. A flag
    overrides everything. Settings without a flag come from

        train, on data/demo       DEMO, and for the rest the defaults of Config
        train, on other data      the defaults of Config
        eval, predict, --resume   the checkpoint

    so the command line is read twice: first to learn which of these it is.
    """
    cfg = tyro.cli(Config, args=argv)
    checkpoint = None
    if cfg.command == "train" and not cfg.resume:
        places = [HERE / "data" / name for name in ("mvtec", "visa", "demo")]
        root = next(filter(Path.is_dir, places), places[-1])
        defaults = Config(data=str(root))
        if Path(cfg.data or root).resolve() == (HERE / "data/demo").resolve():
            defaults = replace(defaults, **DEMO)
    else:
        path = Path(cfg.checkpoint or Path(cfg.out, "checkpoint.pt"))
        checkpoint = read_checkpoint(path, SCRIPT)
        defaults = Config(**checkpoint["config"] | {"out": str(path.parent)})

    cfg = tyro.cli(Config, args=argv, default=defaults)
    check_settings(cfg)
    if checkpoint:
        for name, value in asdict(defaults).items():
            free = name in FREE or name == "batch_size" and not cfg.resume
            if not free and getattr(cfg, name) != value:
                raise UserError(f"--{name.replace('_', '-')}: the checkpoint was trained with "
                                f"{value}; drop the flag, or train anew")
        if cfg.command != "train" and not checkpoint["thresholds"]:
            raise UserError("the checkpoint's training has not finished: --resume it")
    # Data and weights must be found again from any folder.
    cfg.data = os.path.abspath(cfg.data)
    if os.path.isfile(cfg.weights):
        cfg.weights = os.path.abspath(cfg.weights)
    return cfg, checkpoint


def check_settings(cfg: Config) -> None:
    """Raises UserError for settings that would otherwise fail late, or not at all."""
    if (cfg.command == "predict") != bool(cfg.paths):
        raise UserError(f"{cfg.command}: name images after predict, and only there")
    if cfg.command == "train" and cfg.checkpoint and not cfg.resume:
        raise UserError("--checkpoint: is for eval, predict and --resume")
    if UNDER_TORCHRUN and cfg.command != "train":
        raise UserError(f"torchrun: is for training; call {cfg.command} without it")
    if cfg.batch_size % WORLD_SIZE:
        raise UserError(f"--batch-size: give a multiple of {WORLD_SIZE}, the number of processes")
    for name, (least, most) in RANGES.items():
        if not least <= getattr(cfg, name) <= most:
            raise UserError(f"--{name.replace('_', '-')}: give a number from {least} to {most}")
    cfg.check()


def choose_device(name: str) -> torch.device:
    """Turn --device into a torch device, under torchrun each process into its own. Raises UserError
    if this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no GPU; take --device auto")
        torch.cuda.set_device(RANK % torch.cuda.device_count())
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        torch.backends.cudnn.deterministic = True  # convolutions repeat; not all else does
    return torch.device(name)


def autocast(x: Tensor, dtype: torch.dtype) -> torch.autocast:
    """A context in which matrix products and convolutions run in half precision, if x is on a GPU
    that can. [ours] D11

    Elsewhere it does nothing: not every CPU has a fast half precision, and a V100 only emulates
    bfloat16.
    """
    able = dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", dtype, enabled=x.is_cuda and able)


def main(argv: list | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 2 after a mistake of the user's, told in one
    line, or 130 after Ctrl-C."""
    code = 2
    try:
        run(argv)
        return 0
    except KeyboardInterrupt:
        code = 130
        error = "interrupted; --resume goes on from the last checkpoint in --out, if any"
    except torch.OutOfMemoryError:
        error = "the GPU's memory is full; lower --batch-size"
    except (UserError, OSError) as e:  # a missing or unwritable file's own message names it
        # A DataLoader's worker sends its traceback; the message is the end of it.
        error = str(e).rsplit("UserError: ", 1)[-1]
    print(f"{SCRIPT}: error:", *error.split(), file=sys.stderr)  # in one line
    return code


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # for names that the console cannot print
    if hasattr(signal, "SIGPIPE"):  # a quiet end in `... | head`
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
# ==== end shared
