r"""CADA: one detector, one threshold, no class labels (arXiv:2404.00724), on RevDist.

Guo, Han, Lu, Zhang, Li. Absolute-Unified Multi-Class Anomaly Detection via Class-Agnostic
Distribution Alignment, 2024. This is a reconstruction from public facts, and every choice says
where it comes from: [paper] is stated in the paper's abstract, captions or settings; [author] was
seen in public code of its first author (github.com/guojiajeremy/ReContrast); [ours] is a reading of
ours. D1, D2, ... number our readings in the README's list of departures.

The idea. A detector that was trained on many classes scores each of them on a scale of its own: a
normal slab of granite may score higher than a torn wire grid. So no single threshold serves all
classes, and a ranking of all images together is poor. CADA looks at the image and predicts two
numbers: the mean u and the maximum gamma (a typical one, as we read it) of an anomaly map of a
*normal* image of its class. It then rescales the map by them. No class label is used, neither in
training nor at test. The detector is not changed, so nearly any will do [paper]. The one here is
RevDist, the paper's name for RD, reverse distillation (Deng and Li, CVPR 2022, arXiv:2201.10703).

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
    prediction of (u, gamma) [paper]             fit_regression, CADA.regress; form: [ours] D5
    alignment A' [author]                        align
    snapping to levels, not the paper's          find_levels, CADA; [ours] D6
    Fig. 4(a), labels known: row "oracle"        calibrate, aligned_maps; [ours] D7
    absolute-unified evaluation [paper]          the rows "pooled" of the printed table

Read it from the top: first the method, in the order in which an image passes through it, then
training and evaluation. The appendix reads files and writes results. Sections between `shared`
banners stand in cnc.py letter for letter.

    python cada.py                                     train and evaluate; without data/mvtec and
                                                       data/visa on the small set in data/demo
    python cada.py --data DIR                          on MVTec AD, VisA, or a tree of your own
    python cada.py eval --checkpoint FILE              the same numbers again
    python cada.py predict PATH ... --checkpoint FILE  score images, write heat maps
    python cada.py --cnc FILE                          on the CNC in a checkpoint of cnc.py
    torchrun --nproc-per-node=N cada.py ...            train on N GPUs
"""
import csv
import json
import math
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy import ndimage
from scipy.cluster.hierarchy import fcluster, ward
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import train_test_split
from torch import Tensor, distributed, nn
from torch.utils.data import BatchSampler, DataLoader
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import Compose, ConvertImageDtype, Normalize, PILToTensor, Resize
from tqdm import tqdm
from tyro.conf import Positional


# ==== shared: errors and half precision

class UserError(Exception):
    """A mistake that the user can mend. main() prints its one line and ends with exit code 2."""


def half_precision(x, dtype):
    """A context in which matrix products and convolutions run in `dtype`, float16 or bfloat16, if x
    is on a GPU that can (a V100 only emulates bfloat16). Elsewhere it does nothing. [ours] D11"""
    able = dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", dtype, enabled=x.is_cuda and able)
# ==== end shared


# ---- settings ------------------------------------------------------------------------------------
# The comment beside or above a field is also what --help says.

@dataclass
class Config:
    """Train and evaluate CADA on RevDist, evaluate a checkpoint again, or score images with it.

    The defaults are for MVTec AD and VisA, the field's two usual data sets. Optimiser, rate, steps
    and batch size are those with which CADA's first author trains ReContrast, another reverse
    distillation [author]. On data/demo DEMO replaces some of them.
    """

    teacher: str = "wide_resnet50_2"  # frozen ResNet of torchvision's; this one is RD's
    weights: str = "IMAGENET1K_V1"  # of the teacher: a torchvision tag, a file, or none (random)
    # sides in pixels of the square that images are squashed to, a multiple of 32; 256 is RD's
    image_size: int = 256
    batch_size: int = 16  # images a training step [author], of all processes of torchrun together
    iters: int = 5000  # training steps of the detector [author]
    lr: float = 2e-3  # AdamW learning rate, x 0.2 at 80 % of the steps [author]
    # checkpoint of cnc.py: CADA aligns the CNC in it in place of RevDist, and takes over its
    # settings, seed and holdout
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
    # compute the teacher's features of the training images once, into unnamed files in --out;
    # --no-cache computes them anew in every step [ours] D2
    cache: bool = True
    workers: int = min(4, os.cpu_count() or 1)  # processes that read images
    # what eval, predict and --resume read; if not given: checkpoint.pt in --out
    checkpoint: str = ""
    resume: bool = False  # go on with an interrupted training


# On the demo set two CPU cores are enough. [ours] D1
DEMO = {"teacher": "resnet18", "weights": "none", "image_size": 128, "iters": 400, "workers": 0}

# ---- frozen teacher ------------------------------------------------------------------------------
# The teacher was trained on other images (ImageNet) for another task. What it says of an image is
# the thing to be reproduced, so it must never change.

class Teacher(nn.Module):
    """RevDist's teacher, as in RD: a ResNet up to layer3, without gradients, always in eval mode.

    forward: (B, 3, S, S) -> [(B, C1, S/4, S/4), (B, C2, S/8, S/8), (B, C3, S/16, S/16)].
    They are float16, so that they can be stored [ours] D2: after BatchNorm features are small, and
    want the digits of float16 more than the range of bfloat16.
    """

    def __init__(self, resnet, random):
        super().__init__()
        self.random = random  # whether the weights are random, and not trained ones
        stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.layers = nn.Sequential(stem, resnet.layer1, resnet.layer2, resnet.layer3)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stay in eval mode whatever the parent does: the BatchNorm statistics are frozen too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x):
        features = []
        with half_precision(x, torch.float16):
            for layer in self.layers:
                x = layer(x)
                features.append(x.half())
        return features[1:]  # without the stem's


# ---- RevDist student -----------------------------------------------------------------------------
# The student runs the other way round ("reverse" distillation): it gets what the teacher says in
# the end, squeezes it through a bottleneck, and must say again what the teacher said on the way.
# The bottleneck has room for what normal images have in common, and hopefully none for a defect.

downsample2x = partial(torchvision.ops.Conv2dNormActivation, kernel_size=3, stride=2)
upsample2x = partial(nn.ConvTranspose2d, kernel_size=2, stride=2, bias=False)


def residual_stage(resnet, in_channels, planes, depth, up):
    """`depth` residual blocks of the kind that `resnet` has: BasicBlock (expansion 1) or Bottleneck
    (expansion 4). The first halves height and width, or doubles them if `up`:
    (B, in_channels, H, W) -> (B, planes * expansion, H/2, W/2 or 2H, 2W).

    Without `up` this is torchvision's own stage. With `up` the shortcut of the first block and its
    3x3 convolution of stride 2 are replaced by 2x2 transposed convolutions of stride 2.
    """
    kind = type(resnet.layer1[0])
    block = partial(kind, groups=resnet.groups, base_width=resnet.base_width)
    out_channels = planes * kind.expansion
    if up:
        shortcut = upsample2x(in_channels, out_channels)
    else:
        shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)
    shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    first = block(in_channels, planes, stride=2, downsample=shortcut)
    if up and kind is BasicBlock:
        first.conv1 = upsample2x(in_channels, planes)
    elif up:
        width = first.conv2.in_channels
        first.conv2 = upsample2x(width, width, groups=resnet.groups)

    others = [block(out_channels, planes) for _ in range(depth - 1)]
    return nn.Sequential(first, *others)


class Student(nn.Module):
    """What RevDist trains, in RD's shapes: fusion, one-class bottleneck (OCBE), mirrored decoder.

    forward: the teacher's [(B, C1, S/4, S/4), (B, C2, S/8, S/8), (B, C3, S/16, S/16)] -> the same
    shapes, reproduced from a bottleneck of (B, 2 * C3, S/32, S/32), which holds a fourteenth of the
    numbers that are to be reproduced. Only the shapes mirror the teacher's: the weights start at
    random, so that nothing but training can make the two agree.
    83.80 M parameters for wide_resnet50_2: fusion 10.62, bottleneck 48.26, decoder 24.92.
    """

    def __init__(self, resnet):
        super().__init__()
        c1 = 64 * resnet.layer1[0].expansion
        c2 = 2 * c1
        c3 = 4 * c1

        # All three layers meet at the size of the deepest, S/16: layer1 is halved twice on its way
        # (3x3, stride 2, BatchNorm, ReLU), layer2 once.
        self.fuse1 = nn.Sequential(downsample2x(c1, c2), downsample2x(c2, c3))
        self.fuse2 = downsample2x(c2, c3)
        self.bottleneck = residual_stage(resnet, 3 * c3, 512, len(resnet.layer4), up=False)

        # The numbers of blocks run as in the encoder (3, 4, 6 for wide_resnet50_2): decode3, the
        # first to run, has as many as layer1, not as layer3. That is how RD's code has it.
        self.decode3 = residual_stage(resnet, 2 * c3, 256, len(resnet.layer1), up=True)
        self.decode2 = residual_stage(resnet, c3, 128, len(resnet.layer2), up=True)
        self.decode1 = residual_stage(resnet, c2, 64, len(resnet.layer3), up=True)

        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features):
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

    The decoder has learned to reproduce the teacher's features e of normal images only; where its
    answer d fails, the image is anomalous: A(h,w) = mean over layers of 1 - <e,d> / (|e||d|).
    [author] How far it fails on *normal* images differs from class to class: a regular wire grid is
    easy to reproduce, and granite is not. That is the problem that CADA solves.

    This is all that CADA and the shared code ask of a detector:

        preprocess     image -> uint8 tensor (3, S, S)
        standardise    batch of these, on the device -> float (B, 3, S, S), the teacher's input
        teacher        -> features, a list of three float16 tensors; .random: no trained weights
        forward        features -> loss, a scalar
        describe       features -> pooled features (B, F), raw anomaly maps (B, S, S)
        size           S
    """

    def __init__(self, cfg):
        super().__init__()
        self.size = cfg.image_size
        # An image that is not square is squashed [author]. Mean and deviation are ImageNet's.
        self.preprocess = Compose([Resize((self.size, self.size)), PILToTensor()])
        normalise_colours = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.standardise = Compose([ConvertImageDtype(torch.float32), normalise_colours])
        resnet = load_resnet(cfg.teacher, cfg.weights, cfg.seed)
        self.teacher = Teacher(resnet, random=cfg.weights == "none")
        self.student = Student(resnet)  # reads the layout, takes nothing of the weights

    def decode(self, features):
        """Teacher features -> the same, e, and the student's answer, d. Both are float32, because
        1 - cosine of nearly equal vectors would lose its digits in half precision."""
        # One memory layout, cuDNN's own, for features from the cache and from the teacher: the
        # layout decides how a convolution rounds, and both should give the same.
        encoded = [f.float().contiguous(memory_format=torch.channels_last) for f in features]
        with half_precision(features[0], torch.bfloat16):
            decoded = self.student(encoded)
        return encoded, [d.float() for d in decoded]

    def forward(self, features):
        """The loss: the sum over three layers of 1 - cosine, a scalar in 0..3. (Both e and d come
        out of a ReLU, so the cosine is in 0..1.)

        A whole layer is flattened to one vector an image before the cosine [author], so positions
        with large features count for more. In the anomaly map all positions count alike. (A loss by
        positions gave the same results within the spread of seeds.)
        """
        encoded, decoded = self.decode(features)
        loss = 0.0
        for e, d in zip(encoded, decoded):  # (B, C, H, W) each
            distance = 1 - F.cosine_similarity(e.flatten(1), d.flatten(1), dim=1)  # (B,)
            loss = loss + distance.mean()  # over the batch
        return loss

    def describe(self, features):
        """Teacher features -> (pooled (B, 2 * (C1+C2+C3)), raw anomaly map (B, S, S) in 0..1).

        Pooled over the whole image, frozen features tell the class more than the defect, so CADA
        reads these. Mean *and* standard deviation over the positions [ours] D4: with the mean
        alone, brightness drowns texture. align_corners=True is [author].
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


# ---- CADA, after the paper -----------------------------------------------------------------------
# A regression predicts u and gamma from the image [paper]; the map is aligned by them [author]; no
# class label is used [paper]. The alignment stands in `evaluation_batch` of ReContrast's utils.py,
# where the model itself returns both numbers, as its third output. Nothing here knows of RevDist.

def map_statistics(maps):
    """(N, H, W) -> (N, 2): u, the mean, and gamma, the maximum, of each single map. [ours] D5
    gamma lies above u even for a map without contrast: alignment divides by their difference."""
    u = maps.mean((1, 2))
    least = u + 1e-6 * u.abs().clamp(min=1e-9)  # a millionth above u, which float32 still sees
    gamma = maps.amax((1, 2)).maximum(least)
    return torch.stack([u, gamma], dim=1)


def log_statistics(statistics):
    """(N, 2), u and gamma -> (N, 2), log u and log(gamma - u).

    Classes differ by factors, and a logarithm turns factors into differences. [ours] D5 So maps
    must be above 0. A value below a thousandth of the median of these N is raised to it.
    """
    u, gamma = statistics.unbind(1)
    values = torch.stack([u, gamma - u], dim=1)
    least = values.median(0).values / 1000
    return values.maximum(least.clamp(min=1e-30)).log()


def direction(features, mean, std):
    """Pooled features (N, F) -> unit vectors (N, F). We standardise them, or the largest channels
    would decide alone; we clamp them, or one channel could; and we drop the length, which grows
    with the size of a defect. [ours] D4"""
    return F.normalize(((features.float() - mean) / std).clamp(-3, 3))


PENALTIES = np.logspace(-4, 2, 13)  # candidates for the penalty of the ridge regression


def fit_regression(x, y):
    """The regression, y = x weight + bias, from features (N, P) to logarithms (N, 2).

    That a regression predicts u and gamma is [paper]; that it is linear, with a penalty, is ours
    [ours] D5. Returns weight (P, 2), bias (2,) and `unseen` (N, 2): what a fit on all other images
    predicts for each image (leave-one-out), by which the penalty is chosen.
    """
    ridge = RidgeCV(PENALTIES, scoring="neg_mean_squared_error", store_cv_results=True)
    ridge.fit(x.numpy(), y.numpy())
    chosen = list(PENALTIES).index(ridge.alpha_)
    # With a `scoring` given, cv_results_ holds leave-one-out predictions, (N, 2, penalties).
    unseen = torch.from_numpy(ridge.cv_results_[:, :, chosen])
    weight = torch.from_numpy(ridge.coef_.T)
    bias = torch.from_numpy(ridge.intercept_)
    return weight, bias, unseen


def align(maps, u, gamma):
    """A' = (A - u) / (gamma - u), image by image: (N, H, W), (N,), (N,) -> (N, H, W). [author]

    0 is the mean of normal maps of the class and 1 their typical maximum, whatever the class is.
    That holds for training images: 46 % of their maps exceed 1 in the demo. The detector does not
    know other good images as well: 84 % of theirs do. Hence a threshold from images kept back.
    """
    u = u[:, None, None]
    gamma = gamma[:, None, None]
    return (maps - u) / (gamma - u)


# ---- CADA, beyond the paper: levels --------------------------------------------------------------
# A defect that moves the features moves what a regression predicts. So we let the prediction snap
# [ours] D6: on normal images the predictions crowd around *levels*, and an image gets the median
# statistics of the level that its prediction is nearest to. To do harm, a defect must move the
# prediction nearer to another level. (Who reads for the paper alone can go on at "score".)
#
# The regression learns in rounds. In the first its targets are the images' own statistics; after
# it they are the medians of the levels, which pulls the images of a level together. Pooled I-AUROC:
#
#                                                 regression alone   2 rounds   5 rounds
#     ELPV, its two classes scaled apart by us          59.8           63.6       68.8
#     README, "CADA on your own detector"               65.9           71.2       70.6

# These were chosen by trial, on a few small sets, by their test labels (see the README). [ours] D6
ROUNDS = 5  # of regressions
WITHIN = 0.5**2  # levels merge while images lie at most half an error (rms) from their level's mean
LEAST_ERROR = 0.01  # a smaller error, of a logarithm, counts as this one: 1 % is good enough
COMPONENTS = 256  # principal components of the directions that the regression reads [ours] D5
MOST_IMAGES = 4000  # that CADA learns from; Ward's method stores the distance of every pair


def find_levels(unseen, y):
    """Put images together that the regression hardly tells apart. [ours] D6

    unseen: its predictions (N, 2); y: the images' own log_statistics (N, 2). Returns the level of
    each image (N,), numbers from 0 on, and the error (2,), the standard deviation of y - unseen,
    which is the unit of distance here. The error is always that of y, not of a later round's
    targets: these are easier to predict, so the unit would shrink and cut the levels ever finer.
    """
    error = (y - unseen).std(0).clamp(min=LEAST_ERROR)

    # Ward's method starts with a level for each image, and merges, again and again, the two levels
    # whose union adds least to the sum of squares within levels. With predictions 0, 1, 10, 11 it
    # joins 0 and 1 (which adds 1/2), 10 and 11 (1/2), and all (100). SciPy's column 2 is the square
    # root of twice what a merger added.
    tree = ward((unseen / error).numpy())
    within = np.cumsum(tree[:, 2] ** 2 / 2) / len(y)  # the variance within levels after a merger
    number = len(y) - np.sum(within <= WITHIN)  # each merger up to WITHIN leaves one level less
    return fcluster(tree, number, "maxclust") - 1, error


def medians(values, group):
    """(N, 2) and the group of each image (N,) -> (k, 2): the median of each group, because the few
    images that belong elsewhere do not move a median."""
    rows = [values[group == i].median(0).values for i in range(group.max() + 1)]
    return torch.stack(rows)


@dataclass
class CADA:
    """Predict from an image's frozen features [ours] D4 the numbers (u, gamma): mean and maximum of
    the anomaly maps of *normal* images of its class [paper]. gamma is the typical maximum of a
    single map, not the maximum over a class, as we read it [ours] D5."""

    mean: Tensor  # (F,) of the training images' pooled features
    std: Tensor  # (F,) their standard deviation; infinite for a channel that says nothing
    first_weight: Tensor  # (F, 2) of the first round: the regression alone
    first_bias: Tensor  # (2,)
    weight: Tensor  # (F, 2) of the last round
    bias: Tensor  # (2,)
    error: Tensor  # (2,) the unit of distance, see find_levels
    centres: Tensor  # (k, 2) of the levels: median predictions of log u and log(gamma - u)
    statistics: Tensor  # (k, 2): median u and median gamma of each level

    @classmethod
    def fit(cls, features, statistics, seed=0):
        """Learn from 10 or more normal images, of which the seed draws MOST_IMAGES at most: pooled
        features (N, F) and map_statistics (N, 2) of raw maps, on the CPU. No label is used."""
        rows = np.random.default_rng(seed).permutation(len(features))[:MOST_IMAGES]
        features = features[rows].float()
        statistics = statistics[rows].double()

        # What the regression reads: directions, in their principal components.
        mean = features.mean(0)
        std = features.std(0, correction=0)
        # Of a channel that hardly varies in training, a rounding error would be a huge deviation.
        std[std <= std.median() / 1000] = torch.inf
        x = direction(features, mean, std).double()
        # At most half as many components as images: with as many, any y could be fitted.
        pca = PCA(min(COMPONENTS, len(x) // 2, x.shape[1]), random_state=seed).fit(x.numpy())
        components = torch.from_numpy(pca.components_.T)  # (F, P)
        x = x @ components  # (N, P), not centred: the bias takes that up

        y = log_statistics(statistics)
        first_weight, first_bias, unseen = fit_regression(x, y)
        level, error = find_levels(unseen, y)
        for _ in range(ROUNDS - 1):
            targets = log_statistics(medians(statistics, level))  # (k, 2), of each level
            weight, bias, unseen = fit_regression(x, targets[level])
            level, error = find_levels(unseen, y)

        # Centres are medians of leave-one-out predictions: a new image is unseen, too.
        learned = [mean, std, components @ first_weight, first_bias, components @ weight, bias,
                   error, medians(unseen, level), medians(statistics, level)]
        return cls(*[values.float() for values in learned])

    def regress(self, features):
        """By the regression alone, the first round, which is as near to the paper as we know it:
        (N, F) -> u (N,) and gamma (N,)."""
        logs = direction(features, self.mean, self.std) @ self.first_weight + self.first_bias
        u, contrast = logs.exp().unbind(1)
        return u, u + contrast

    def predict(self, features):
        """(N, F) -> u (N,) and gamma (N,), gamma > u: those of the level whose centre is nearest to
        what the regression predicts, in units of its error."""
        logs = direction(features, self.mean, self.std) @ self.weight + self.bias
        difference = (logs[:, None] - self.centres) / self.error  # (N, k, 2)
        nearest = difference.square().sum(2).argmin(1)
        return self.statistics[nearest].unbind(1)


# ==== shared: score
# These turn an anomaly map into one number an image, and many numbers into a threshold.

def smooth(maps):
    """Gaussian blur of (N, H, W) maps. Sigma is 4 pixels at 256 x 256 [author], and grows with the
    size of the image. Where the author evaluates CADA, the kernel is cut to 5 x 5; ours reaches 4
    sigma, and edges are repeated. [ours] D8

    The kernel sums to one, so with repeated edges a constant map stays constant. The blur therefore
    commutes with (A - u) / (gamma - u): to align before it [author] or after it is the same.
    """
    sigma = maps.shape[-1] / 64  # 256 / 64 = 4
    # A sigma of 0 along the first dimension keeps images apart.
    blurred = ndimage.gaussian_filter(maps.numpy(), (0, sigma, sigma), mode="nearest")
    return torch.from_numpy(blurred)


def image_score(maps):
    """Mean of the highest 1 % of the pixels of each map, which is steadier than the maximum:
    (N, H, W) -> (N,). [author]"""
    pixels = maps.flatten(1)
    highest = max(1, pixels.shape[1] // 100)  # 655 pixels of 256 x 256
    return pixels.topk(highest, dim=1).values.mean(1)


def conformal_threshold(scores, quantile=0.99):
    """The ceil((n + 1) quantile)-th smallest of the scores (n,) of normal images, or the largest if
    n is below that. [ours] D9 A new normal image like these lies above it with a probability of at
    most 1 - quantile, if n is large enough (99 for 0.99) and nothing has learned from these n."""
    n = len(scores)
    rank = min(math.ceil((n + 1) * quantile), n)  # the + 1 counts the new image among the n
    return scores.kthvalue(rank).values.item()
# ==== end shared


# ==== shared: batches and features
# How training and evaluation see the data: some images are kept back, the others come in a fixed
# order, and the features of the frozen teacher are computed once.

def hold_out(cfg, samples, checkpoint):
    """Indices of the normal images to train on, and of those kept back at random for the threshold,
    because the decoder knows its training images too well. With --holdout 0 both are all images,
    and the threshold comes out too low. [ours] D9

    Raises UserError if the checkpoint was trained on other images, perhaps on some kept back now.
    """
    used = held = list(range(len(samples)))
    if cfg.holdout > 0:
        used, held = train_test_split(used, test_size=cfg.holdout, random_state=cfg.seed)
    if checkpoint and checkpoint["images"] != [samples[i].name for i in used]:
        raise UserError(f"--data {cfg.data}: not the images of the checkpoint; give its --data")
    print(f"threshold: from {len(held)} normal images; it takes 99 that are kept back to flag no "
          "more than 1 % of good images", file=sys.stderr)
    return used, held


def shuffled_batches(cfg, n, steps):
    """The batches of a whole training run, lists of indices below n, epoch after epoch. They follow
    from the settings and the number of processes, so a resumed run goes on with the same ones."""
    size = cfg.batch_size // WORLD_SIZE  # WORLD_SIZE: the number of torchrun's processes, or 1
    # Each process (RANK says which) draws an order of its own. In one order for all, the i-th
    # images of the shares samples[RANK::WORLD_SIZE] would meet in a batch, often of one class.
    generator = torch.Generator().manual_seed(cfg.seed + RANK)
    epochs = math.ceil(steps * size / n)  # a batch may reach into the next epoch
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    return order[:steps * size].view(steps, size).tolist()


def image_features(cfg, detector, samples, batches=None):
    """Yield the teacher's features of these batches of indices, or of all samples in order. Raises
    UserError if they are not finite."""
    for x in image_batches(cfg, detector, samples, batches):
        features = detector.teacher(x)
        if not all(f.isfinite().all() for f in features):
            raise UserError(f"--teacher {cfg.teacher} --weights {cfg.weights}: its features do not "
                            "fit float16, or are not numbers; take other weights")
        yield features


def training_features(cfg, detector, samples, batches):
    """Yield the teacher's features of each batch of indices. There is no augmentation [author], so
    every epoch would compute the same: they are computed once [ours] D2, or with --no-cache anew.

    They are stored in unnamed files in --out, one for each layer, which disappear with the process,
    even a killed one. The system keeps in memory what fits.
    """
    if not cfg.cache:
        yield from image_features(cfg, detector, samples, batches)
        return

    files = [tempfile.TemporaryFile(dir=cfg.out) for _ in range(3)]
    for features in image_features(cfg, detector, samples):
        for file, f in zip(files, features):
            # write() raises an error if the disk is full; a mapped file would crash
            file.write(f.cpu().contiguous().numpy())
    device = features[0].device  # as of all batches
    stored = [np.memmap(file, np.float16, "r", shape=(len(samples), *f.shape[1:]))
              for file, f in zip(files, features)]
    for batch in batches:
        yield [torch.from_numpy(layer[batch]).to(device) for layer in stored]


@torch.no_grad()
def describe_images(cfg, detector, samples):
    """Yield pooled features (B, F) and raw anomaly maps (B, S, S) of the samples, batch by batch,
    on the CPU."""
    detector.eval()  # no dropout, BatchNorm frozen: a score must not depend on chance or its batch
    for features in image_features(cfg, detector, samples):
        pooled, maps = detector.describe(features)
        yield pooled.cpu(), maps.cpu()
# ==== end shared


# ---- training ------------------------------------------------------------------------------------
# First the detector, then CADA on the detector as it is. With torchrun several processes train
# together, each on its share of the images.

def train(cfg, detector, samples, checkpoint):
    """Train on normal images, from where the checkpoint stopped if there is one. Returns the new
    checkpoint.

    Only the student learns. All classes are mixed in every batch, and nobody tells it which image
    is of which (model-unified). There is no validation and no choice of a best step, which only
    test images would allow: the last step counts.
    """
    start, losses = first_step(cfg, checkpoint, cfg.iters)
    if start == cfg.iters:  # trained already
        return checkpoint
    if detector.teacher.random and start == 0:
        # With torchrun every process reads all images here, so that all have the same teacher.
        estimate_statistics(detector.teacher, image_batches(cfg, detector, samples))

    # Optimiser and schedule: [author], written for ReContrast.
    student = detector.student
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr, weight_decay=1e-5, fused=True)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    # Under torchrun the gradient is the mean over all processes, which is that of one large batch
    # if BatchNorm, too, sees all of it. On CPUs PyTorch has no such BatchNorm.
    model = detector
    if WORLD_SIZE > 1:
        distributed.init_process_group()
        if next(student.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(student)  # in place, the parameters stay
        model = nn.parallel.DistributedDataParallel(detector)

    share = samples[RANK::WORLD_SIZE]  # the images of this process
    batches = shuffled_batches(cfg, len(share), cfg.iters)
    stream = training_features(cfg, detector, share, batches[start:])
    detector.train()
    stream = tqdm(stream, "training", cfg.iters, initial=start, disable=None)
    for step, features in enumerate(stream, start + 1):
        # The rate follows from the step alone, so a resumed run needs no state of a scheduler.
        optimizer.param_groups[0]["lr"] = cfg.lr * (0.2 if step > 0.8 * cfg.iters else 1)

        loss = model(features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if step % math.ceil(cfg.iters / 10) == 0 or step == cfg.iters:  # about ten times
            losses[step] = loss.item()
            checkpoint = {"images": [s.name for s in samples], "step": step, "losses": losses,
                          "optimizer": optimizer.state_dict()}
            save_checkpoint(cfg, detector, checkpoint)
            remove_results(cfg)  # those of an earlier run, which are not this checkpoint's

    if WORLD_SIZE > 1:
        distributed.destroy_process_group()
    return checkpoint


# ---- calibration and evaluation ------------------------------------------------------------------

def calibrate(cfg, detector, normal, held):
    """Fit CADA to a trained detector, and take the thresholds from the normal images that were kept
    back; `held` has their indices. Returns what the checkpoint keeps of it.

    CADA is fitted on all normal images, so that it sees maps of images that the detector does not
    know, too. The price: an image that was kept back has moved its own level a little, more in a
    small class, which weakens the threshold's promise.
    """
    # Three small things are kept of each map: all maps of VisA would take gigabytes.
    parts = [(pooled, map_statistics(maps), image_score(smooth(maps)))
             for pooled, maps in describe_images(cfg, detector, normal)]
    features, statistics, raw = map(torch.cat, zip(*parts))  # (N, F), (N, 2), (N,)

    cada = CADA.fit(features, statistics, cfg.seed)
    # The oracle, our reading of Fig. 4(a) [ours] D7, knows labels: it takes the medians of classes,
    # as CADA takes those of levels. CADA reads no label.
    names, classes = np.unique([s.cls for s in normal], return_inverse=True)
    oracle = dict(zip(names.tolist(), medians(statistics, classes)))

    # A score, the mean of the highest 1 %, is aligned like a pixel: these stay the highest.
    u, gamma = cada.predict(features[held])
    aligned = (raw[held] - u) / (gamma - u)
    thresholds = {"raw": conformal_threshold(raw[held]), "cada": conformal_threshold(aligned)}
    return {"cada": asdict(cada), "oracle": oracle, "thresholds": thresholds}


def aligned_maps(raw, features, samples, checkpoint):
    """Yield the smoothed raw maps (N, S, S) of samples in four variants: "raw", as they are;
    "oracle", aligned by the statistics of the true class, if the checkpoint knows all classes;
    "regress", aligned by the regression alone; "cada", aligned by CADA.

    Of the rows of the table, "pooled" (one ranking of all images) should rise from raw to cada.
    "class mean" (a ranking per class, where scale costs nothing) should not fall: where it does,
    CADA has taken defects for another class and aligned them away. (The oracle knows the class but
    not the image, so it is no upper limit.)
    """
    yield "raw", raw
    oracle = checkpoint["oracle"]
    unknown = {s.cls for s in samples} - oracle.keys()
    if unknown:
        print("no rows of the oracle: it has not seen", *sorted(unknown), file=sys.stderr)
    else:
        u, gamma = torch.stack([oracle[s.cls] for s in samples]).unbind(1)
        yield "oracle", align(raw, u, gamma)
    cada = CADA(**checkpoint["cada"])
    yield "regress", align(raw, *cada.regress(features))
    yield "cada", align(raw, *cada.predict(features))


def evaluate(cfg, detector, test, checkpoint):
    """Report how well each variant tells good from defective test images."""
    # Blurred once for all variants, since aligning commutes with blurring.
    parts = [(pooled, smooth(maps)) for pooled, maps in describe_images(cfg, detector, test)]
    features, raw = map(torch.cat, zip(*parts))  # (N, F), (N, S, S)
    variants = aligned_maps(raw, features, test, checkpoint)
    scores = report(cfg, test, detector.size, variants, "cada", checkpoint)
    plot_distributions(cfg, test, scores, checkpoint["thresholds"])


# ---- the script ----------------------------------------------------------------------------------

def run(argv):
    """The whole story: load, train, calibrate, evaluate; or load and predict."""
    cfg, checkpoint = read_command_line(argv)
    if cfg.cnc and not checkpoint:
        cfg, checkpoint = adopt_cnc(cfg, argv)

    if cfg.command == "predict":
        samples = images_to_score(cfg)
        detector = build(cfg, checkpoint)
        cada = CADA(**checkpoint["cada"])
        maps = (align(smooth(raw), *cada.predict(pooled))
                for pooled, raw in describe_images(cfg, detector, samples))
        write_predictions(cfg, samples, maps, checkpoint, "cada")
        return

    normal, test = read_dataset(Path(cfg.data), cfg.command == "train")
    detector = build(cfg, checkpoint)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    if cfg.command == "train":
        used, held = hold_out(cfg, normal, checkpoint)
        samples = [normal[i] for i in used]
        if not cfg.cnc:
            checkpoint = train(cfg, detector, samples, checkpoint)
        if RANK > 0:  # of torchrun's processes only the first evaluates and writes
            return
        checkpoint = checkpoint | calibrate(cfg, detector, normal, held)
        save_checkpoint(cfg, detector, checkpoint)
        remove_results(cfg)
    if test:
        evaluate(cfg, detector, test, checkpoint)


# ---- Appendix ------------------------------------------------------------------------------------
# First what only this script needs: rules for its settings, the detector as it is at the start or
# in a checkpoint, ResNets from their library, a random teacher's statistics, a picture of all
# scores, and CADA on a CNC. Then what any such script needs.

# Written into checkpoints. Whoever changes what they hold changes this name, too.
WRITER = "cada.py (format 2)"
# By command, the settings that may differ from a checkpoint's. "train" is for --resume, the only
# training that reads a checkpoint, and "cnc" for --cnc.
FREE = {"train": "command checkpoint out weights device workers resume data cache iters lr",
        "eval": "command checkpoint out weights device workers data batch_size",
        "predict": "command checkpoint out weights device workers paths batch_size",
        "cnc": "command checkpoint out weights device workers cnc data"}


def check_method(cfg):
    """Raises UserError for settings that RevDist cannot have."""
    if cfg.iters < 1:
        raise UserError("--iters: give at least 1")
    if cfg.image_size % 32 and not cfg.cnc:
        raise UserError("--image-size: give a multiple of 32, such as 256")


def build(cfg, checkpoint):
    """The detector on its device, with the weights of a checkpoint if there is one."""
    if cfg.cnc:
        return build_cnc(cfg, checkpoint)
    torch.manual_seed(cfg.seed)  # for the student's weights; the teacher draws apart
    detector = RevDist(cfg)
    if checkpoint:
        load_weights(detector, checkpoint)
    if detector.teacher.random:
        print("teacher: RANDOM weights; its numbers are not the paper's", file=sys.stderr)
    return detector.to(choose_device(cfg.device), memory_format=torch.channels_last)


def load_resnet(name, weights, seed):
    """A ResNet of torchvision's with weights from a file or a tag, or with random ones ("none").
    Raises UserError for an unknown name, and for weights that cannot be had or do not fit."""
    stored = Path(weights).is_file()
    # A random stream of its own: teacher and student do not depend on each other's draws.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            tag = None if stored or weights == "none" else weights
            resnet = torchvision.models.get_model(name, weights=tag)
            if not isinstance(resnet, torchvision.models.ResNet):
                raise ValueError("not a ResNet")
            resnet.fc = nn.Identity()  # not used, so a file may know any number of classes
            if stored:
                found = torch.load(weights, map_location="cpu", weights_only=True)
                resnet.load_state_dict({key: found[key] for key in resnet.state_dict()})
        except Exception as e:  # unknown, no network, weights that do not fit: many kinds
            raise UserError(f"--teacher {name} --weights {weights}: {str(e)[:200]}; give a ResNet "
                            "of torchvision's and a tag or an existing file of its weights, or "
                            "none")
    return resnet


def estimate_statistics(teacher, batches):
    """Give a random teacher the BatchNorm statistics of the training images. [ours] D1

    Fresh statistics (mean 0, variance 1) let the activations of a random ResNet drift from layer to
    layer, until all images look alike.
    """
    torch.optim.swa_utils.update_bn(batches, teacher.layers)  # a plain mean over all batches


def plot_distributions(cfg, samples, scores, thresholds):
    """Draw one tick an image: raw and aligned scores by class, normal images above and anomalous
    ones below the line of their class. Where the normal scores of all classes end at the same
    place, one threshold serves them all."""
    labels = np.array([s.label for s in samples])
    names, line = np.unique([s.cls for s in samples], return_inverse=True)
    colours = np.where(labels == 1, "#D55E00", "#0072B2")  # colour-blind readers tell them apart
    figure = Figure(figsize=(12, 1.8 + 0.5 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for ax, variant in zip(panels, ("raw", "cada")):
        ax.scatter(scores[variant], line + 0.4 * labels - 0.2, 150, colours, marker="|", alpha=0.7)
        ax.axvline(thresholds[variant], color="black", linestyle="--")
        ax.set_title(variant)
    panels[0].set_yticks(range(len(names)), names, parse_math=False)
    panels[0].set_ylim(len(names) - 0.5, -0.5)  # of both panels; downwards
    figure.supxlabel("image score; blue: normal, orange: anomalous, dashed: threshold")
    figure.savefig(Path(cfg.out, "distributions.png"), dpi=150)


def adopt_cnc(cfg, argv):
    """The settings, with CNC's for the detector and for the images kept back, and the checkpoint of
    cnc.py that --cnc names, to which `calibrate` then adds. Raises UserError for a flag that
    differs from CNC's, and if there is no such checkpoint, or no finished one."""
    import cnc  # for --cnc alone: to read and run RevDist, this file is enough
    checkpoint = read_checkpoint(cfg.cnc, cnc.WRITER)
    if not checkpoint["thresholds"]:
        raise UserError(f"--cnc {cfg.cnc}: its training has not finished; --resume it with cnc.py")
    checkpoint["cnc"] = checkpoint["config"]
    checkpoint["optimizer"] = None  # CNC learns no more

    names = ("teacher", "weights", "image_size", "batch_size", "lr", "seed", "holdout")
    adopted = {name: checkpoint["cnc"][name] for name in names}
    defaults = Config(cnc=cfg.cnc, data=cfg.data, workers=cfg.workers, out="runs/cada-on-cnc",
                      iters=checkpoint["step"], **adopted)
    cfg = tyro.cli(Config, args=argv, default=defaults)
    refuse_changes(cfg, defaults, FREE["cnc"])
    if Path(cfg.out).resolve() == Path(cfg.cnc).resolve().parent:
        raise UserError("--out: give another folder than CNC's, whose checkpoint would be lost")
    first_step(cfg, None, 0)  # warns if --out holds another training
    return cfg, checkpoint


def build_cnc(cfg, checkpoint):
    """The CNC of a checkpoint that adopt_cnc began."""
    import cnc
    settings = checkpoint["cnc"] | {"device": cfg.device, "weights": cfg.weights}
    try:
        return cnc.build(cnc.Config(**settings), checkpoint)
    except cnc.UserError as e:
        raise UserError(str(e))


# ==== shared: checkpoint
def first_step(cfg, checkpoint, steps):
    """Print and return where a training starts: the number of steps done, and {step: loss}. Raises
    UserError if they are more than `steps`."""
    if not checkpoint:
        if Path(cfg.out, "checkpoint.pt").exists():
            print(f"{cfg.out}: holds another training, which this one replaces", file=sys.stderr)
        return 0, {}
    done = checkpoint["step"]
    print(f"--resume: seed {cfg.seed}, step {done} of {steps}", file=sys.stderr)
    if done > steps:
        raise UserError("--resume: trained for longer already; give a larger --iters or --epochs")
    return done, checkpoint["losses"]


def remove_results(cfg):
    """Remove what an earlier run has reported into --out."""
    for name in ("scores.csv", "metrics.json", "heatmaps.png", "distributions.png"):
        Path(cfg.out, name).unlink(missing_ok=True)


def save_checkpoint(cfg, detector, checkpoint):
    """Write checkpoint.pt, whole or not at all, and say so. Raises UserError for weights that are
    not finite, and if the file cannot be written. A checkpoint is a dict of tensors and the like:

        writer, config     who wrote it, with which settings
        weights            a state_dict for each part of the detector, but for a trained teacher
        fingerprint        of the teacher
        images             class and file name of each image that it was trained on
        step, optimizer    to go on from
        losses             {step: loss}, for the steps at which a checkpoint was written
        thresholds         by variant, see calibrate; {} before the training is finished
        and of cada.py     cada, oracle; cnc, the settings of CNC if that is the detector
    """
    if RANK > 0:  # of torchrun's processes only the first writes
        return
    weights = {name: part.state_dict() for name, part in detector.named_children()}
    if not detector.teacher.random:
        del weights["teacher"]  # they have a file of their own
    for part in weights.values():
        if not all(w.isfinite().all() for w in part.values()):
            raise UserError("the training diverged, its weights are not finite; give a lower --lr")
    content = {"thresholds": {}} | checkpoint | {
        "writer": WRITER, "config": asdict(cfg), "weights": weights,
        "fingerprint": fingerprint(detector.teacher)}

    path = Path(cfg.out, "checkpoint.pt")
    unfinished = path.with_suffix(".partial")
    try:
        torch.save(content, unfinished)
        os.replace(unfinished, path)  # in one go, by the system
    except RuntimeError as e:  # PyTorch's own, on a full disk for instance
        raise UserError(f"{path}: cannot be written: {e}; is there room in --out?")
    finally:
        unfinished.unlink(missing_ok=True)
    step = content["step"]
    told = content["thresholds"] or "none yet; --resume would go on from here"
    tqdm.write(f"{path}: step {step}, loss {content['losses'][step]:.4f}, thresholds {told}",
               sys.stderr)


def read_checkpoint(path, writer):
    """A checkpoint that `writer` wrote. Raises UserError if it is none."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint.get("writer", "another version")
        if found != writer:
            raise ValueError(f"{found} wrote it")
    except Exception as e:  # no such file, no checkpoint, a malicious one: many kinds
        raise UserError(f"{path}: no checkpoint of {writer}: {str(e)[:100]}; name one, or train")
    return checkpoint


def load_weights(detector, checkpoint):
    """Put the weights of a checkpoint into the detector. Raises UserError if its teacher is not the
    one that the checkpoint was trained with, and for weights of another version."""
    if not math.isclose(fingerprint(detector.teacher), checkpoint["fingerprint"], rel_tol=1e-6):
        raise UserError("--weights: not the teacher of the training; give the same weights")
    try:
        for name, weights in checkpoint["weights"].items():
            detector.get_submodule(name).load_state_dict(weights)
    except RuntimeError as e:
        raise UserError(f"the checkpoint is of another version: {str(e)[:200]}; train anew")


def fingerprint(teacher):
    """A number that tells whether a file or a download still holds the same weights. 0 for a random
    teacher, whose weights are in the checkpoint."""
    if teacher.random:
        return 0.0
    return sum(w.double().abs().sum().item() for w in teacher.state_dict().values())
# ==== end shared


# ==== shared: data
# Two layouts are read: that of MVTec AD, which most data sets of the field have been converted to,
# and VisA's own archive. Labels come from folders or from VisA's list, never from masks.

SUFFIXES = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
GOOD = ("good", "ok", "normal")  # folders of normal images, in upper or lower case


@dataclass
class Sample:
    """One image of a data set. No model sees its class `cls`, which serves the report and, in
    cada.py, the oracle."""

    path: Path
    cls: str = ""
    label: int = 0  # 1 is anomalous; from the folder name, since a small defect may lose its mask
    mask: Path = None

    @property
    def name(self):
        """What a checkpoint knows it by."""
        return self.cls, self.path.name


def files_in(folder, pattern):
    """The files that match, in name order, without hidden ones. In a pattern * follows links to
    folders, and ** does not."""
    return [path for path in sorted(folder.glob(pattern))
            if path.is_file() and "/." not in f"/{path.relative_to(folder).as_posix()}"]


def is_image(path):
    """Whether Pillow reads files of this type."""
    return path.suffix.lower() in SUFFIXES


def read_dataset(root, training=True):
    """(train, test), two lists of samples of a data set. Without `training` there need be no
    training images, and they are not opened. Raises UserError that says what is wrong."""
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder; give its place, also if it has moved")
    visa = (root / "split_csv/1cls.csv").is_file()
    train, test = read_visa(root) if visa else read_mvtec(root)
    if not (training or test):
        raise UserError(f"--data {root}: no test images; see data/README.md")
    untrained = {s.cls for s in test} - {s.cls for s in train}
    if training and (len(train) < 10 or untrained):
        raise UserError(f"--data {root}: {len(train)} training images, classes without: "
                        f"{sorted(untrained)}; put 10 or more normal ones into <class>/train/good")
    check_files(train + test if training else test)

    # Most of what can go wrong with a data set shows in this line.
    masks = {s.mask for s in test if s.mask}
    used = {s.path for s in train + test} | masks
    unused = [path for path in files_in(root, "**/*") if path not in used]
    print(f"{root}: {len(train)} training and {len(test)} test images, "
          f"{sum(s.label for s in test)} of them defective, {len(masks)} masks; "
          f"{len(unused)} files not used", *unused[:1], file=sys.stderr)
    for path in unused:  # else a misplaced mask would be ignored, and nobody would notice
        if "ground_truth" in path.relative_to(root).parts and is_image(path):
            raise UserError(f"{path}: not the mask of a test image; see data/README.md")
    return train, test


def read_mvtec(root):
    """Read an MVTec-style tree, <class>/{train/good,test/<kind>,ground_truth/<kind>}/*, or the
    folder of a single class. The mask of 000.png is 000_mask or 000, with any suffix: names decide,
    never sort order. A set may have no masks at all, but if it has some, each defective image needs
    one. Raises UserError where it is missing."""
    single = (root / "train").is_dir() or (root / "test").is_dir()
    classes = "" if single else "*/"
    normal = images_by_name(root, classes + "train/*/*")
    train = [Sample(path, cls) for (cls, kind, _), path in normal.items() if kind.lower() in GOOD]

    masks = images_by_name(root, classes + "ground_truth/*/*")
    test = []
    for name, path in images_by_name(root, classes + "test/*/*").items():
        cls, kind, _ = name
        label = int(kind.lower() not in GOOD)
        if label and masks and name not in masks:
            raise UserError(f"{path}: no mask in ground_truth/{kind}; add it, or remove all masks")
        test.append(Sample(path, cls, label, masks.get(name)))
    return train, test


def images_by_name(root, pattern):
    """{(class, kind, name without suffix and _mask): path} of the images that match a pattern.
    Raises UserError where two share their name."""
    found = {}
    for path in filter(is_image, files_in(root, pattern)):
        cls, _, kind, _ = path.absolute().parts[-4:]  # of a single class cls is the root's name
        name = (cls, kind, path.stem.removesuffix("_mask"))
        if name in found:
            raise UserError(f"{path} shares its name with {found[name]}; rename one, and keep "
                            "masks in ground_truth")
        found[name] = path
    return found


def read_visa(root):
    """Read the raw VisA archive by its own split file. Raises UserError if it cannot be read."""
    path = root / "split_csv/1cls.csv"
    samples = {"train": [], "test": []}
    try:
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            label = int(row["label"].lower() != "normal")
            mask = root / row["mask"] if label else None
            samples[row["split"]].append(Sample(root / row["image"], row["object"], label, mask))
    except Exception as e:  # other columns, another encoding, a short row: many kinds
        raise UserError(f"{path}: {e!r}; take VisA's own list, as it is")
    return samples["train"], samples["test"]


def check_files(samples):
    """Decode every image and mask once: a broken file must stop the run before the training and not
    after it. Raises UserError, which names the first five that cannot be used."""
    with ThreadPoolExecutor() as pool:  # threads suffice: Pillow decodes without Python's lock
        found = pool.map(mistake_in, samples)
        bar = tqdm(found, "checking images", len(samples), leave=False, disable=None)
        mistakes = [mistake for mistake in bar if mistake]
    if mistakes:
        raise UserError(f"{'; '.join(mistakes[:5])}; {len(mistakes)} in all")


def mistake_in(sample):
    """What is wrong with the files of a sample, or None."""
    try:
        image = load_image(sample.path)
        if sample.mask:
            with Image.open(sample.path) as file:
                turned = file.getexif().get(0x0112, 1) != 1  # EXIF's orientation
            if turned or load_mask(sample.mask).size != image.size:
                return (f"mask {sample.mask}: its image has another size, or is turned by EXIF; "
                        "save both upright and equally large")
    except UserError as e:
        return str(e)


def open_image(path):
    """An image file, decoded, upright, with 8 bits a channel. What is transparent is black,
    whatever colour it hides. Raises UserError if it is not one image of 8 or 16 bits a channel."""
    try:
        with Image.open(path) as file:
            frames = getattr(file, "n_frames", 1)
            image = ImageOps.exif_transpose(file)
    except Exception as e:  # Pillow's readers raise many kinds for a broken file
        raise UserError(f"cannot read image {path}: {e}; mend path or file, or leave it out")
    several = frames > 1 and file.format != "MPO"  # a phone's MPO is one photograph
    if several or image.mode in ("I", "F"):
        raise UserError(f"{path}: several frames, or 32 bits a pixel; save one image of 8 bits")

    if image.mode.startswith("I;16"):  # convert() would clip; ceil keeps small numbers
        image = Image.fromarray(np.ceil(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image


def load_image(path):
    """An image file as 8-bit RGB. Raises UserError if it is nearly black."""
    image = open_image(path).convert("RGB")
    brightest = np.max(image.getextrema())
    if brightest <= 16:  # as the images of a 12-bit camera in files of 16 bits: 4095 / 257 = 15.9
        raise UserError(f"{path}: nearly black, {brightest} of 255 at most; stretch its values")
    return image


def load_mask(path):
    """A mask as a black and white image. Every value above 0 is defective: VisA's masks hold 1 to
    9, others the colours of a palette. But if a mask without a palette has values above 127, as
    MVTec AD's have, only those count: blur and JPEG leave small ones. A colour counts by its
    brightest channel. [ours] D10"""
    values = np.asarray(open_image(path).convert("RGB")).max(2)
    bright = values.max() > 127 and Image.open(path).mode != "P"
    return Image.fromarray(values > (127 if bright else 0))


def load_batch(preprocess, samples):
    """The samples as preprocessed images, uint8 (B, 3, S, S): a quarter of float32's memory."""
    return torch.stack([preprocess(load_image(s.path)) for s in samples])


def image_batches(cfg, detector, samples, batches=None):
    """Yield standardised images (B, 3, S, S) on the detector's device: these batches of indices, or
    if there are none all samples in order."""
    if batches is None:
        batches = BatchSampler(range(len(samples)), cfg.batch_size, drop_last=False)
    loader = DataLoader(samples, batch_sampler=batches, num_workers=cfg.workers,
                        collate_fn=partial(load_batch, detector.preprocess))
    device = next(detector.parameters()).device
    for x in tqdm(loader, "images", leave=False, disable=None):
        yield detector.standardise(x.to(device))
# ==== end shared


# ==== shared: metrics
# Good images and pixels are negatives, defective ones positives; a higher score is more anomalous.

def ranking_metrics(kind, scores, positive):
    """<kind>-AUROC, <kind>-AP and <kind>-F1max in 0..1 of scores with bool labels of the same
    shape; for pixels, kind "P", (N, H, W), also AUPRO. {} if all labels are equal.

    scikit-learn gives the same and takes 25 times as long on pixels, of which few are positive:
    every distinct score is a threshold, but the true-positive rate changes only at scores of
    positives. So each distinct score of a positive gives two points of the ROC curve, one with the
    threshold just above it and one with the threshold at it, and all that lies between is straight.
    Four images, positives scored 9 and 4, negatives 6 and 1:

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

    def curve(above, at):
        """(K,), (K,) -> (2K + 2,): both points of each threshold, between the corners 0 and 1."""
        return np.concatenate([[0], np.stack([above, at], axis=1).ravel(), [1]])

    fpr = curve(fp_above / len(negatives), fp / len(negatives))
    tpr = curve(tp_above / len(positives), tp / len(positives))
    recall_gained = (tp - tp_above) / len(positives)
    metrics = {f"{kind}-AUROC": area_under(fpr, tpr, 1),
               f"{kind}-AP": float(np.sum(recall_gained * tp / (tp + fp))),
               f"{kind}-F1max": float(np.max(2 * tp / (tp + fp + len(positives))))}
    if kind == "P":
        overlap = region_overlap(scores, positive)
        metrics["AUPRO"] = area_under(fpr, curve(overlap[tp_above], overlap[tp]), 0.3)
    return metrics


def area_under(x, y, limit):
    """Area under the curve through points (x, y), x rising, from 0 to `limit`, divided by `limit`:
    1 is perfect. Between two points, and so at the limit, the curve is a straight line."""
    inside = x <= limit
    end = np.interp(limit, x, y)
    return float(np.trapezoid(np.append(y[inside], end), np.append(x[inside], limit)) / limit)


def region_overlap(scores, positive):
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


def summarise(scores, labels, classes, maps, masks):
    """All metrics by both protocols: {class: {}, ..., "class mean": {}, "pooled": {}}, from image
    scores, labels and classes (N,), and from maps and bool masks (N, S, S).

    pooled: all classes in one ranking, as one threshold sees them (absolute-unified).
    class mean: a ranking per class, then the unweighted mean (model-unified), in which differences
    in scale cost nothing. A class with one kind of images has no such metric, and does not count.
    """
    def metrics(rows):
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
def report(cfg, samples, size, variants, decides, checkpoint):
    """Print and write how well the maps of some variants tell good from defective samples. Returns
    image scores (N,) by variant. variants: pairs of a name and maps (N, size, size), made as they
    are needed, since maps are large; `decides` names the one whose threshold flags images."""
    thresholds = checkpoint["thresholds"]
    classes = np.array([s.cls for s in samples])
    labels = np.array([s.label for s in samples])
    masks = load_masks(samples, size)
    lost = sum(s.label == 1 and bool(s.mask) and not m.any() for s, m in zip(samples, masks))
    if lost:
        print(f"{lost} masks are empty at {size} x {size}: the metrics of pixels miss their "
              "defects, those of images do not; give a larger --image-size", file=sys.stderr)

    # heatmaps.png has 16 columns at most, and a row for each variant that has a threshold.
    shown = range(0, len(samples), math.ceil(len(samples) / 16))
    rows = [[load_image(samples[i].path).resize((size, size)) for i in shown],
            [Image.fromarray(masks[i]).convert("RGB") for i in shown]]
    scores = {}
    results = {}
    for variant, maps in variants:
        scores[variant] = image_score(maps).numpy()
        results[variant] = summarise(scores[variant], labels, classes, maps.numpy(), masks)
        if variant in thresholds:
            rows.append([overlay(image, maps[i], thresholds[variant])
                         for image, i in zip(rows[0], shown)])

    if results[decides]["pooled"]:
        print_table(results)
    else:
        print("no table: metrics compare good with defective images, and one kind is missing")
    flagged = scores[decides] > thresholds[decides]
    good = flagged[labels == 0]  # these should be False
    bad = flagged[labels == 1]  # and these True
    print(f"threshold {thresholds[decides]:.4f}: flags {good.sum()} of {len(good)} good and "
          f"{bad.sum()} of {len(bad)} defective test images; more in {cfg.out}")
    with open(Path(cfg.out, "scores.csv"), "w", newline="", encoding="utf-8",
              errors="surrogateescape") as file:  # a name that is no UTF-8, as the system has it
        writer = csv.writer(file)
        writer.writerow(["path", "class", "label", "anomalous", *scores])
        writer.writerows(zip([s.path for s in samples], classes, labels, flagged, *scores.values()))
    # Everything needed to quote a number: settings, losses, thresholds, metrics in 0..1.
    content = {"config": asdict(cfg), "losses": checkpoint["losses"], "thresholds": thresholds,
               "results": results}
    Path(cfg.out, "metrics.json").write_text(json.dumps(content, indent=2))
    picture = np.vstack([np.hstack(row) for row in rows])
    Image.fromarray(picture).save(Path(cfg.out, "heatmaps.png"))
    return scores


def load_masks(samples, size):
    """The masks of samples, bool (N, size, size), False where there is none. They are binarised
    before they are resized: the other way round thin defects blur. A good image has none."""
    masks = np.zeros((len(samples), size, size), bool)
    for i, s in enumerate(samples):
        if s.label and s.mask:
            masks[i] = load_mask(s.mask).resize((size, size), Image.NEAREST)
    return masks


def print_table(results):
    """A line for each class, the class mean and the pooled metrics, of each variant; in %."""
    parts = next(iter(results.values()))  # all variants have the same
    names = parts["pooled"]
    print(" " * 22, *[f"{name:>9}" for name in names], sep="")
    for part in parts:
        for variant in results:
            found = results[variant][part]
            values = [f"{100 * found.get(name, math.nan):9.1f}" for name in names]
            print(f"{part[:12]:14}{variant:8}", *values, sep="")


def overlay(image, amap, threshold):
    """An RGB image with its map (S, S) on it: clear up to half the threshold, and hottest from
    1.5 times the threshold on. To scale each map by itself would paint good images as defective."""
    heat = (amap / threshold - 0.5).clamp(0, 1).numpy()
    colours = colormaps["inferno"](heat, alpha=0.8 * heat, bytes=True)  # (S, S, 4)
    layer = Image.fromarray(colours).resize(image.size)
    return Image.composite(layer, image, layer)  # the map's transparency is the mask


def images_to_score(cfg):
    """What predict is to score: images that are named, and those in folders that are named. Raises
    UserError if there is none, or one that cannot be read."""
    places = [Path(place) for place in cfg.paths]
    found = []
    for place in places:
        found += files_in(place, "**/*") if place.is_dir() else [place]
    samples = [Sample(path) for path in found if is_image(path) or path in places]
    print(f"{len(samples)} images; {len(found) - len(samples)} files not used", file=sys.stderr)
    if not samples:
        raise UserError(f"no image to score in {', '.join(cfg.paths)}; name some")
    check_files(samples)
    return samples


def write_predictions(cfg, samples, batches, checkpoint, variant):
    """For each sample a line of JSON, and the image with its map on it. batches: the maps
    (B, S, S), computed as they are needed."""
    folder = Path(cfg.out, "predict")
    folder.mkdir(parents=True, exist_ok=True)
    threshold = checkpoint["thresholds"][variant]
    maps = (amap for batch in batches for amap in batch)
    for number, (sample, amap) in enumerate(zip(samples, maps)):
        score = image_score(amap[None]).item()
        target = folder / f"{number:04}-{sample.path.stem[:50]}.png"  # names have a limit
        overlay(load_image(sample.path), amap, threshold).save(target)
        print(json.dumps({"path": str(sample.path), "score": score, "threshold": threshold,
                          "anomalous": score > threshold, "overlay": str(target)}), flush=True)
# ==== end shared


# ==== shared: command line and device
HERE = Path(__file__).resolve().parent
# torchrun says which of its processes this is, and of how many. Clusters set the same variables for
# other purposes, so they count only under torchrun.
UNDER_TORCHRUN = distributed.is_torchelastic_launched()
ENVIRONMENT = os.environ if UNDER_TORCHRUN else {}
RANK = int(ENVIRONMENT.get("RANK", 0))
LOCAL_RANK = int(ENVIRONMENT.get("LOCAL_RANK", 0))  # of the processes on this machine
WORLD_SIZE = int(ENVIRONMENT.get("WORLD_SIZE", 1))


def read_command_line(argv):
    """The settings, and the checkpoint, or None if none is to be read. Raises UserError for a
    checkpoint that cannot be used, and for settings that are impossible.

    tyro makes a flag of each field of Config, and its help of the comment beside it. Settings
    without a flag come from Config and, on data/demo, from DEMO; for eval, predict and --resume
    from the checkpoint. So the command line is read twice: first to learn which of these it is.
    """
    cfg = tyro.cli(Config, args=argv)
    checkpoint = None
    if cfg.command == "train" and not cfg.resume:
        places = [HERE / "data" / name for name in ("mvtec", "visa", "demo")]
        data = cfg.data or str(next(filter(Path.is_dir, places), places[-1]))
        demo = Path(data).resolve() == places[-1].resolve()
        defaults = Config(data=data, **DEMO if demo else {})
    else:
        path = Path(cfg.checkpoint or Path(cfg.out, "checkpoint.pt"))
        checkpoint = read_checkpoint(path, WRITER)
        defaults = Config(**checkpoint["config"] | {"out": str(path.parent)})

    cfg = tyro.cli(Config, args=argv, default=defaults)
    check_settings(cfg)
    if checkpoint:
        refuse_changes(cfg, defaults, FREE[cfg.command])
        if cfg.command != "train" and not checkpoint["thresholds"]:
            raise UserError("the checkpoint's training has not finished: --resume it")
    return cfg, checkpoint


def check_settings(cfg):
    """Raises UserError for settings that do not go together."""
    if (cfg.command == "predict") != bool(cfg.paths):
        raise UserError(f"{cfg.command}: name images after predict, and only there")
    if cfg.command == "train" and cfg.checkpoint and not cfg.resume:
        raise UserError("--checkpoint: is for eval, predict and --resume")
    if UNDER_TORCHRUN and (cfg.command != "train" or cfg.batch_size % WORLD_SIZE):
        raise UserError(f"torchrun: is for training, --batch-size a multiple of {WORLD_SIZE}")
    if not 0 <= cfg.holdout < 1:
        raise UserError("--holdout: give 0 or more, but less than 1")
    check_method(cfg)


def refuse_changes(cfg, defaults, free):
    """Raises UserError for a setting that is not free, and differs from the checkpoint's."""
    for name, value in vars(defaults).items():
        if name not in free.split() and getattr(cfg, name) != value:
            raise UserError(f"--{name.replace('_', '-')}: the checkpoint has {value!r}; drop it")


def choose_device(name):
    """Turn --device into a torch device, under torchrun each process into its own. Raises UserError
    if this machine does not have it."""
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise UserError("--device cuda: PyTorch finds no GPU; take --device auto")
    if name == "cpu" or not found:
        return torch.device("cpu")
    torch.cuda.set_device(LOCAL_RANK)
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    return torch.device("cuda")


def main(argv=None):
    """Run the command line. Returns the exit code: 0, 2 after a mistake of the user's, told in one
    line, or 130 after Ctrl-C."""
    try:
        run(argv)
        return 0
    except KeyboardInterrupt:
        print("interrupted; --resume goes on, if a checkpoint was written", file=sys.stderr)
        return 130
    except (UserError, OSError) as e:  # a missing or unwritable file's own message names it
        print(f"{Path(__file__).name}: error:", *str(e).split(), file=sys.stderr)  # in one line
        return 2


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # for names that the console cannot print
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
# ==== end shared
