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
import csv
import json
import math
import os
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
from torch.utils.data import BatchSampler, DataLoader
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import Compose, ConvertImageDtype, Normalize, PILToTensor, Resize
from tqdm import tqdm
from tyro.conf import Positional


# ---- settings ------------------------------------------------------------------------------------
# The comment beside or above a field is also what --help says.

@dataclass
class Config:
    """Train and evaluate CADA on RevDist, evaluate a checkpoint again, or score images with it.

    The defaults are for MVTec AD and VisA, the field's two usual data sets. They train RevDist as
    CADA's first author trains ReContrast, a sibling of it, in public code [author]. On data/demo a
    smaller teacher and fewer steps replace them.
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
    workers: int = min(4, os.cpu_count() or 1)  # processes that read images
    # what eval, predict and --resume read; if not given: checkpoint.pt in --out
    checkpoint: str = ""
    resume: bool = False  # go on with an interrupted training

    def check(self):
        """Raises UserError for what RANGES cannot say."""
        if self.image_size % 32:
            raise UserError("--image-size: give a multiple of 32, such as 256")


# Settings that a checkpoint fixes: with other ones it would not fit, or not mean the same.
FIXED = ("teacher", "image_size", "cnc", "seed", "holdout")
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
    They are float16, so that they can be stored [ours] D2: after BatchNorm features are small, and
    want the digits of float16 more than the range of bfloat16.
    Raises UserError for an unknown name, and for weights that cannot be had or do not fit.
    """

    def __init__(self, name, weights, seed):
        super().__init__()
        self.random = weights == "none"
        # A random stream of its own: teacher and student do not depend on each other's draws.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                resnet = load_resnet(name, weights)
                stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
            except Exception as e:  # unknown, no network, weights that do not fit: many kinds
                raise UserError(f"--teacher {name} --weights {weights}: {str(e)[:200]}; give a "
                                "ResNet of torchvision's and a tag or file of its weights, or none")

        self.stem = stem
        self.layer1 = resnet.layer1
        self.layer2 = resnet.layer2
        self.layer3 = resnet.layer3
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stay in eval mode whatever the parent does: the BatchNorm statistics are frozen too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x):
        with autocast(x, torch.float16):
            f1 = self.layer1(self.stem(x))
            f2 = self.layer2(f1)
            f3 = self.layer3(f2)
        return [f1.half(), f2.half(), f3.half()]


def load_resnet(name, weights):
    """A ResNet of torchvision's with weights from a file or a tag, or with random ones ("none")."""
    if weights != "none" and not Path(weights).is_file():
        return torchvision.models.get_model(name, weights=weights)
    resnet = torchvision.models.get_model(name, weights=None)
    if weights != "none":
        resnet.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return resnet


# ---- RevDist student -----------------------------------------------------------------------------
# The student runs the other way round ("reverse" distillation): it gets what the teacher says in
# the end, squeezes it through a bottleneck, and must say again what the teacher said on the way.
# The bottleneck has room for what normal images have in common, and hopefully none for a defect.

def residual_stage(resnet, in_channels, planes, depth, up):
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

    def __init__(self, teacher_name):
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

    def __init__(self, cfg):
        super().__init__()
        self.size = cfg.image_size
        # An image that is not square is squashed [ours] D3. Mean and deviation are ImageNet's.
        self.preprocess = Compose([Resize((self.size, self.size)), PILToTensor()])
        normalise_colours = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.standardise = Compose([ConvertImageDtype(torch.float32), normalise_colours])
        self.teacher = Teacher(cfg.teacher, cfg.weights, cfg.seed)
        self.student = Student(cfg.teacher)

    def decode(self, features):
        """Teacher features -> the same, and the student's version. Both are float32, because 1 -
        cosine of nearly equal vectors would lose its digits in half precision."""
        # One memory layout, cuDNN's own, for features from the cache and from the teacher, because
        # the layout decides how a convolution rounds.
        encoded = [f.float().contiguous(memory_format=torch.channels_last) for f in features]
        with autocast(features[0], torch.bfloat16):
            decoded = self.student(encoded)
        return encoded, [d.float() for d in decoded]

    def forward(self, features):
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

    def describe(self, features):
        """Teacher features -> (pooled (B, 2 * (C1+C2+C3)), raw anomaly map (B, S, S) in 0..2).

        Pooled over the whole image, frozen features tell the class more than the defect, so CADA
        reads these. Mean *and* standard deviation over the positions [ours] D4: with the mean
        alone, brightness drowns texture. align_corners=True is [author].
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
WITHIN = 0.5**2  # levels merge until images lie half an error (rms) from their level's mean
LEAST_ERROR = 0.01  # a smaller error counts as this one: to alignment 1 % is as good as exact


def map_statistics(maps):
    """(N, H, W) -> (N, 2): u, the mean, and gamma, the maximum, of each map. gamma lies above u
    even for a map without contrast, since alignment divides by their difference."""
    u = maps.mean((1, 2))
    least = u + 1e-6 * u.abs().clamp(min=1)  # 1e-6 above u; more where float32 would lose that
    gamma = maps.amax((1, 2)).maximum(least)
    return torch.stack([u, gamma], dim=1)


def log_statistics(statistics):
    """(N, 2), u and gamma -> (N, 2), log u and log(gamma - u).

    Classes differ by factors, and a logarithm turns factors into differences. So maps must be above
    0, as distances are. A value below a thousandth of the median counts as that.
    """
    u, gamma = statistics.unbind(1)
    values = torch.stack([u, gamma - u], dim=1)
    least = values.median(0).values / 1000
    return values.maximum(least.clamp(min=1e-9)).log()


def direction(features, mean, std):
    """Pooled features (N, F) -> unit vectors (N, F). We standardise them, or the largest channels
    would decide alone; we clamp them, or one channel could; and we drop the length, which grows
    with the size of a defect. [ours] D4"""
    return F.normalize(((features.float() - mean) / std).clamp(-3, 3))


def fit_regression(x, y):
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


def find_levels(unseen, y):
    """Put images together that the regression hardly tells apart. [ours] D6

    unseen: its predictions (N, 2); y: the images' own log_statistics (N, 2). Returns the level of
    each image (N,), numbers from 0 on, and the error (2,), the standard deviation of y - unseen,
    which is the unit of distance here. It is always that of y, not of a later round's targets:
    these are easier to predict, so the unit would shrink and cut the levels ever finer.
    """
    error = np.maximum((y - unseen).std(0), LEAST_ERROR)

    # Ward's method starts with a level for each image, and merges, again and again, the two whose
    # union adds least to the squares within levels. SciPy's column 2 is sqrt(2 x what it added).
    tree = ward(unseen / error)
    within = np.cumsum(tree[:, 2] ** 2 / 2) / len(y)  # the variance after each merger
    level = fcluster(tree, WITHIN, "monocrit", monocrit=within) - 1  # mergers up to WITHIN
    return level, error


def medians(values, level):
    """(N, 2) and the level of each image (N,) -> (k, 2): the median of each level, because the few
    images that belong elsewhere do not move a median."""
    rows = [values[level == i].median(0).values for i in range(level.max() + 1)]
    return torch.stack(rows)


@dataclass
class CADA:
    """Predict (u, gamma), the mean and the maximum of anomaly maps of *normal* images of an image's
    class [paper], from its frozen features [ours] D4. gamma is the typical maximum of a single map,
    not the maximum over a class, as we read it [ours] D5.

    The paper calls the predictor a regression. But a defect that moves the features moves what a
    regression predicts. So we let the prediction snap [ours] D6: on normal images the predictions
    crowd around levels, and an image gets the median statistics of the level that its prediction is
    nearest to. To do harm, a defect must move the prediction nearer to another level.

    The regression learns in rounds. In the first its targets are the images' own statistics; then
    they are the medians of the levels, which pulls the images of a level together.
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
    def fit(cls, features, statistics, seed=0):
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
        # At most half as many components as images: with as many, any y could be fitted.
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

    def regress(self, features):
        """By the regression alone, the first round: (N, F) -> u (N,) and gamma (N,)."""
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


def normalise(maps, u, gamma):
    """A' = (A - u) / (gamma - u), image by image: (N, H, W), (N,), (N,) -> (N, H, W). [author]

    0 is the mean of normal maps of the class and 1 their typical maximum, whatever the class is.
    About half of normal maps exceed 1 before the blur, and fewer after it.
    """
    u = u[:, None, None]
    gamma = gamma[:, None, None]
    return (maps - u) / (gamma - u)


# ==== shared: map and score
# These turn an anomaly map into one number an image, and many numbers into a threshold.

def smooth(maps):
    """Gaussian blur of (N, H, W) maps. Sigma is 4 pixels at 256 x 256 [author], in proportion at
    other sizes. There the kernel is cut to 5 x 5; here it reaches 4 sigma, and edges repeat.
    [ours] D8

    The kernel sums to one, so with repeated edges a constant map stays constant. The blur therefore
    commutes with (A - u) / (gamma - u): to normalise before it [author] or after it is the same.
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
    there are fewer. A new normal image like these lies above it with a probability of at most
    1 - quantile, if n is large enough (99 for 0.99) and nothing has learned from these n. (In
    cada.py CADA has, and the promise is a little weaker.) [ours] D9"""
    n = len(scores)
    rank = min(math.ceil((n + 1) * quantile), n)  # the + 1 counts the new image among the n
    return scores.kthvalue(rank).values.item()
# ==== end shared


# ---- training ------------------------------------------------------------------------------------
# First the detector, then CADA on the detector as it is. With torchrun several processes train
# together, each on its share of the images.

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


def train(cfg, detector, samples, checkpoint):
    """Train on normal images, from where the checkpoint stopped if there is one. Returns the new
    checkpoint.

    Only the student learns. All classes are mixed in every batch, and nobody tells it which image
    is of which (model-unified). There is no validation and no best epoch, which only test images
    could choose: the last step counts.
    """
    start = checkpoint["step"] if checkpoint else 0
    if start >= cfg.iters:  # trained already
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
    # Under torchrun the gradient is the mean over all processes, which is that of one large batch
    # if BatchNorm, too, sees all of it. On CPUs PyTorch has no such BatchNorm.
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
        late = step > int(0.8 * cfg.iters)
        optimizer.param_groups[0]["lr"] = 0.2 * cfg.lr if late else cfg.lr

        loss = engine(encoded)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        if step % 20 == 0:  # seldom: item() waits for the GPU
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if step % math.ceil(cfg.iters / 10) == 0 or step == cfg.iters:  # about ten times
            checkpoint = {"images": [(s.cls, s.path.name) for s in samples], "step": step,
                          "optimizer": optimizer.state_dict()}
            save_checkpoint(cfg, detector, checkpoint)

    if WORLD_SIZE > 1:
        distributed.destroy_process_group()
    return checkpoint


# ---- calibration and evaluation ------------------------------------------------------------------

def calibrate(cfg, detector, normal, held):
    """Fit CADA to a trained detector, and take the thresholds from the normal images `held`.
    Returns what the checkpoint keeps of it.

    CADA learns from all normal images, those held out included: else it would know only maps of
    images that the detector was trained on. So a held-out image has moved its own level a little,
    more in a small class, and the threshold's promise is a little weaker.
    """
    # Of each map three numbers are kept: all maps of VisA would take gigabytes.
    parts = [(pooled, map_statistics(maps), image_score(smooth(maps)))
             for pooled, maps in describe_images(cfg, detector, normal)]
    features, statistics, raw = map(torch.cat, zip(*parts))  # (N, F), (N, 2), (N,)

    cada = CADA.fit(features, statistics, cfg.seed)
    # The oracle, our reading of Fig. 4(a) [ours] D7, knows labels: class means over these images.
    # CADA reads no label.
    classes = np.array([s.cls for s in normal])
    oracle = {}
    for c in np.unique(classes):
        oracle[str(c)] = statistics[classes == c].mean(0)  # (2,)

    # A score is aligned like the map itself, since a mean of pixels commutes with it. The mean of
    # aligned normal maps is about 0, as `normalise` says.
    u, gamma = cada.predict(features[held])
    aligned = (raw[held] - u) / (gamma - u)
    return {
        "cada": asdict(cada), "oracle": oracle,
        "thresholds": {"raw": conformal_threshold(raw[held]), "cada": conformal_threshold(aligned)},
        "means": {"raw": statistics[held, 0].mean().item(), "cada": 0.0}}


def aligned_maps(raw, features, samples, checkpoint):
    """Yield the smoothed raw maps (N, S, S) of samples in four variants: "raw", as they are;
    "oracle", aligned by the statistics of the true class, if the checkpoint knows all these
    classes; "regress", aligned by the regression alone; "cada", aligned by CADA.

    In the table, "pooled" (one ranking of all images) should rise from raw to cada. "class mean" (a
    ranking per class, where scale costs nothing) should not fall: else defects passed for classes.
    (The oracle knows the class but not the image, so it is no upper limit.)
    """
    yield "raw", raw
    oracle = checkpoint["oracle"]
    if all(s.cls in oracle for s in samples):
        u, gamma = torch.stack([oracle[s.cls] for s in samples]).unbind(1)
        yield "oracle", normalise(raw, u, gamma)
    cada = CADA(**checkpoint["cada"])
    yield "regress", normalise(raw, *cada.regress(features))
    yield "cada", normalise(raw, *cada.predict(features))


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
        checkpoint = adopt_cnc(cfg)

    if cfg.command == "predict":
        samples = images_to_score(cfg)
        detector = build(cfg, checkpoint)
        cada = CADA(**checkpoint["cada"])
        maps = (normalise(smooth(raw), *cada.predict(pooled))
                for pooled, raw in describe_images(cfg, detector, samples))
        write_predictions(cfg, samples, maps, checkpoint, "cada")
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
        save_checkpoint(cfg, detector, checkpoint)
    if test:
        evaluate(cfg, detector, test, checkpoint)


# ---- Appendix: what any such script needs --------------------------------------------------------
# One who reads for the paper may stop here. First what only this script needs: a random teacher's
# statistics, a picture of all scores, and CADA on a CNC in place of RevDist.

def estimate_statistics(teacher, batches):
    """Give a random teacher the BatchNorm statistics of the training images. [ours] D1

    Fresh statistics (mean 0, variance 1) let the activations of a random ResNet drift from layer to
    layer, until all images look alike.
    """
    # A container of its own, since Teacher.train never leaves eval mode. update_bn is PyTorch's own
    # plain mean over all batches. It runs the layers in train mode, and puts them back.
    layers = nn.Sequential(teacher.stem, teacher.layer1, teacher.layer2, teacher.layer3).eval()
    torch.optim.swa_utils.update_bn(batches, layers)


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
    panels[0].set_yticks(range(len(names)), [name[:14] for name in names], parse_math=False)
    panels[0].set_ylim(len(names) - 0.5, -0.5)  # of both panels; downwards
    figure.supxlabel("image score; blue: normal, orange: anomalous, dashed: threshold")
    figure.savefig(Path(cfg.out, "distributions.png"), dpi=150)


def adopt_cnc(cfg):
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
    if not os.path.isfile(cfg.weights):
        cfg.weights = checkpoint["cnc"]["weights"]
    if cfg.out == Config.out:  # that is RevDist's
        cfg.out = "runs/cada-on-cnc"
    return checkpoint


def build_cnc(cfg, checkpoint):
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

def hold_out(cfg, samples, checkpoint):
    """Indices of the normal images to train on, and of those kept back at random for the threshold,
    because the decoder knows its training images too well. With --holdout 0 both are all images,
    and the threshold comes out too low. [ours] D9

    Raises UserError if the checkpoint was trained on other images, perhaps on some kept back now.
    """
    kept = held = list(range(len(samples)))
    if cfg.holdout > 0:
        kept, held = train_test_split(kept, test_size=cfg.holdout, random_state=cfg.seed)
    images = [(samples[i].cls, samples[i].path.name) for i in kept]
    if checkpoint and checkpoint["images"] != images:
        raise UserError(f"--data {cfg.data}: not the images of the checkpoint; give its --data")
    if len(held) < 99:
        print(f"threshold: the highest score of {len(held)} normal images; expect "
              f"{1 / (len(held) + 1):.0%} of false alarms or more", file=sys.stderr)
    return kept, held


def shuffled_batches(cfg, n, steps):
    """The batches of a whole training run, lists of indices below n, epoch after epoch. They follow
    from the settings alone, so a resumed run goes on with the same ones."""
    size = cfg.batch_size // WORLD_SIZE
    # Each process of torchrun has an order of its own. The i-th images of all shares are neighbours
    # in the data set, often of one class: if all had the same order, these would meet in one step.
    generator = torch.Generator().manual_seed(cfg.seed + RANK)
    epochs = math.ceil(steps * size / n)  # a batch may reach into the next epoch
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    return order[:steps * size].view(steps, size).tolist()


def teacher_features(cfg, detector, samples, batches):
    """Yield the teacher's features of each batch of indices. Training uses no augmentation, so
    every epoch would compute the same: they are computed once [ours] D2, or with --no-cache anew.

    The features of an image are one row of float16 in an unnamed file in --out, which disappears
    with the process, even a killed one. The system keeps in memory what fits.
    """
    if not cfg.cache:
        for x in image_batches(cfg, detector, samples, batches):
            yield detector.teacher(x)
        return

    file = tempfile.TemporaryFile(dir=cfg.out)
    for x in image_batches(cfg, detector, samples):
        features = detector.teacher(x)
        rows = torch.cat([f.flatten(1) for f in features], dim=1)
        file.write(rows.cpu().numpy())  # a full disk is an error here; in a mapped file, a crash
    shapes = [f.shape[1:] for f in features]
    sizes = [shape.numel() for shape in shapes]
    stored = np.memmap(file, np.float16, "r", shape=(len(samples), sum(sizes)))
    for batch in batches:
        rows = torch.from_numpy(stored[batch]).to(x.device)
        yield [f.unflatten(1, shape) for f, shape in zip(rows.split(sizes, dim=1), shapes)]


@torch.no_grad()
def describe_images(cfg, detector, samples):
    """Yield pooled features (B, F) and raw anomaly maps (B, S, S) of the samples, batch by batch,
    on the CPU."""
    detector.eval()  # no dropout, BatchNorm frozen: a score must not depend on chance or its batch
    for x in image_batches(cfg, detector, samples):
        pooled, maps = detector.describe(detector.teacher(x))
        yield pooled.cpu(), maps.cpu()


def save_checkpoint(cfg, detector, checkpoint):
    """Write checkpoint.pt, whole or not at all, and remove the results of an earlier run from
    --out. A checkpoint is a dict of plain values and tensors:

        script, config     who wrote it, with which settings
        weights            a state_dict for each part of the detector, without a trained teacher
        fingerprint        of the teacher
        images             class and file name of each image that it was trained on
        step, optimizer    to go on from
        thresholds, means  by variant, see calibrate; {} before the training is finished
        and of cada.py     cada, oracle; cnc, the settings of CNC if that is the detector

    Raises UserError for weights that are not finite, and if the file cannot be written.
    """
    if RANK > 0:  # of torchrun's processes only the first writes
        return
    weights = {name: part.state_dict() for name, part in detector.named_children()}
    for w in weights["student"].values():
        if not w.isfinite().all():
            raise UserError("the training diverged, its weights are not finite; give a lower --lr")
    if not detector.teacher.random:
        del weights["teacher"]  # they have a file of their own
    content = {"thresholds": {}, "means": {}} | checkpoint | {
        "script": SCRIPT, "config": asdict(cfg), "weights": weights,
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
    for name in RESULTS:
        Path(cfg.out, name).unlink(missing_ok=True)


def read_checkpoint(path, script):
    """A checkpoint that `script` wrote. Raises UserError if it is none."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != script:
            raise ValueError(f"{checkpoint['script']} wrote it")
    except Exception as e:  # no such file, no checkpoint, a malicious one: many kinds
        raise UserError(f"{path}: no checkpoint of {script}: {str(e)[:100]}; name one, or train")
    return checkpoint


def load_weights(detector, checkpoint):
    """Put the weights of a checkpoint into the detector. Raises UserError if its teacher is not the
    one that the checkpoint was trained with."""
    weights = checkpoint["weights"]
    same = detector.teacher.random == ("teacher" in weights)  # both random, or both trained
    if same:
        for name in weights:
            detector.get_submodule(name).load_state_dict(weights[name])
        same = math.isclose(fingerprint(detector.teacher), checkpoint["fingerprint"], rel_tol=1e-6)
    if not same:
        raise UserError("--weights: not the teacher of the training; give the same weights")


def fingerprint(module):
    """A number that tells whether a file or a download still holds the same weights."""
    return sum(w.double().abs().sum().item() for w in module.state_dict().values())
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
    mask: Path | None = None


def files_in(folder, pattern):
    """The files that match, in name order, without hidden ones. A * follows links to folders, and
    ** does not."""
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
    images = train + test if training else test
    if not images:
        raise UserError(f"--data {root}: {len(train)} training, 0 test images; see data/README.md")
    untrained = {s.cls for s in test} - {s.cls for s in train}
    if training and (len(train) < 10 or untrained):
        raise UserError(f"--data {root}: {len(train)} training images, classes without: "
                        f"{sorted(untrained)}; put 10 or more normal ones into <class>/train/good")
    check_files(images)

    # Most of what can go wrong with a data set shows in this line.
    masks = {s.mask for s in test if s.mask}
    used = {s.path for s in train + test} | masks
    unused = [path for path in files_in(root, "**/*") if path not in used]
    print(f"{root}: {len(train)} training and {len(test)} test images, "
          f"{sum(s.label for s in test)} of them defective, {len(masks)} masks; "
          f"{len(unused)} files not used", *unused[:1], file=sys.stderr)
    for path in unused:  # else the metrics of pixels would be missing, and nobody would notice
        if "ground_truth" in path.parts and is_image(path):
            raise UserError(f"{path}: not the mask of a test image; see data/README.md")
    return train, test


def read_mvtec(root):
    """Read an MVTec-style tree, <class>/{train/good,test/<kind>,ground_truth/<kind>}/*, or the
    folder of a single class. The mask of 000.png is 000_mask or 000, with any suffix: names decide,
    never sort order. A set may have no masks at all, but if it has some, each defective image needs
    one. Raises UserError where it is missing, or where two files share their name."""
    single = (root / "train").is_dir() or (root / "test").is_dir()
    found = {"train": {}, "test": {}, "ground_truth": {}}
    for path in filter(is_image, files_in(root, "*/*/*" if single else "*/*/*/*")):
        cls, part, kind, _ = path.absolute().parts[-4:]  # of a single class cls is the root's name
        name = (cls, kind, path.stem.removesuffix("_mask"))
        if part not in found or part == "train" and kind.lower() not in GOOD:
            continue
        if name in found[part]:
            raise UserError(f"{path} shares its name with {found[part][name]}; rename one, and "
                            "keep masks in ground_truth")
        found[part][name] = path

    train = [Sample(path, cls) for (cls, _, _), path in found["train"].items()]
    masks = found["ground_truth"]
    test = []
    for name, path in found["test"].items():
        cls, kind, _ = name
        label = int(kind.lower() not in GOOD)
        if label and masks and name not in masks:
            raise UserError(f"{path}: no mask in ground_truth/{kind}; add it, or remove all masks")
        test.append(Sample(path, cls, label, masks.get(name)))
    return train, test


def read_visa(root):
    """Read the raw VisA archive by its own split file. Raises UserError if that is not VisA's."""
    path = root / "split_csv/1cls.csv"
    samples = {"train": [], "test": []}
    try:
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            label = int(row["label"].lower() != "normal")
            mask = root / row["mask"] if label else None
            samples[row["split"]].append(Sample(root / row["image"], row["object"], label, mask))
        samples["train"][0]  # an empty list is not VisA's
    except Exception as e:  # other columns, another encoding, a short row: many kinds
        raise UserError(f"{path}: {e!r}; take VisA's own list, as it is")
    return samples["train"], samples["test"]


def check_files(samples):
    """Decode every image and mask once: a broken file must stop the run before the training and not
    after it. Raises UserError for it, and for a mask that does not lie on its image."""
    def check(sample):
        image = load_image(sample.path)
        if sample.mask:
            with Image.open(sample.path) as file:
                turned = file.getexif().get(ExifTags.Base.Orientation, 1) != 1
            if turned or load_mask(sample.mask).size != image.size:
                raise UserError(f"mask {sample.mask}: its image has another size, or is turned by "
                                "EXIF; save both upright and equally large")

    with ThreadPoolExecutor() as pool:  # threads suffice: Pillow decodes without Python's lock
        checks = pool.map(check, samples)
        list(tqdm(checks, "checking images", len(samples), leave=False, disable=None))


def open_image(path):
    """An image file, decoded and upright. Raises UserError if it cannot be read as one image of 8
    or 16 bits a channel."""
    try:
        with Image.open(path) as file:
            frames = getattr(file, "n_frames", 1)
            image = ImageOps.exif_transpose(file)
    except Exception as e:  # Pillow's readers raise many kinds for a broken file
        raise UserError(f"cannot read image {path}: {e}; repair, convert or remove it")
    several = frames > 1 and file.format != "MPO"  # a phone's MPO is one photograph
    if several or image.mode in ("I", "F"):
        raise UserError(f"{path}: several frames, or 32 bits a pixel; save one image of 8 bits")
    return image


def load_image(path):
    """An image file as 8-bit RGB. Raises UserError if it is nearly black."""
    image = open_image(path)
    if image.mode.startswith("I;16"):  # convert() would clip it
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    image = image.convert("RGB")
    brightest = np.max(image.getextrema())
    if brightest <= 16:  # 12 bits in 16 reach 4095 / 257, rounded 16
        raise UserError(f"{path}: nearly black, {brightest} of 255 at most; stretch its values")
    return image


def load_mask(path):
    """A mask as a black and white image. Every value above 0 is defective: VisA's masks hold 1 to
    9, others the colours of a palette. But if a mask without a palette has values above 127, as
    MVTec AD's have, only those count: blur and JPEG leave small ones. A colour counts by its
    brightest channel, and what is transparent is black. [ours] D10"""
    image = open_image(path)
    if image.mode.startswith("I;16"):  # convert() would clip it
        values = np.asarray(image) / 257
    else:  # RGBa is RGBA with colours multiplied by their opacity
        values = np.asarray(image.convert("RGBA").convert("RGBa"))[..., :3].max(2)
    bright = values.max() > 127 and image.mode != "P"
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
    class mean: a ranking per class, then the unweighted mean (model-unified), which allows each
    class a threshold of its own, so that a difference in level costs nothing. A class without good
    or without defective images has no such metric, and does not count.
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
# The table comes first: no picture that fails may cost the numbers.

RESULTS = ("scores.csv", "metrics.json", "heatmaps.png", "distributions.png")


def report(cfg, samples, size, variants, decides, checkpoint):
    """Print and write how well the maps of some variants tell good from defective samples. Returns
    image scores (N,) by variant.

    variants: an iterable of pairs, a name and maps (N, size, size), so that few maps are in memory
    at once; `decides` names the one whose threshold flags images. No threshold comes from test
    labels; only F1max says what the best one would have been.
    """
    paths = [s.path for s in samples]
    classes = np.array([s.cls for s in samples])
    labels = np.array([s.label for s in samples])
    masks = np.zeros((len(samples), size, size), bool)
    for i, s in enumerate(samples):
        if s.mask:  # binarised before it is resized: the other way round thin defects blur
            masks[i] = load_mask(s.mask).resize((size, size), Image.NEAREST)

    # heatmaps.png shows the last good and the last defective image of each class, 24 at most.
    last = {(s.cls, s.label): i for i, s in enumerate(samples)}
    shown = [last[key] for key in sorted(last)][:24]
    rows = {"image": [load_image(paths[i]).resize((size, size)) for i in shown],
            "ground truth": masks[shown]}
    scores = {}
    results = {}
    for variant, maps in variants:
        scores[variant] = image_score(maps).numpy()
        results[variant] = summarise(scores[variant], labels, classes, maps.numpy(), masks)
        if variant in checkpoint["thresholds"]:
            rows[f"{variant} map"] = heat(maps[shown], checkpoint, variant)

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
              errors="surrogateescape") as file:  # a name that is no UTF-8, as the system has it
        writer = csv.writer(file)
        writer.writerow(["path", "class", "label", "anomalous", *scores])
        writer.writerows(zip(paths, classes, labels, flagged, *scores.values()))
    # Everything needed to quote a number: settings, thresholds, metrics in 0..1.
    content = {"config": asdict(cfg), "cnc": checkpoint.get("cnc"),
               "thresholds": checkpoint["thresholds"], "results": results}
    Path(cfg.out, "metrics.json").write_text(json.dumps(content, indent=2))
    plot_heatmaps(cfg, rows, [samples[i] for i in shown])
    return scores


def print_table(results):
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


def heat(maps, checkpoint, variant):
    """Maps of a variant -> 0..1 by one fixed scale: 0 at the mean of normal maps, 1 at twice the
    threshold. To scale each image by itself would paint good ones in the colours of defects."""
    mean = checkpoint["means"][variant]
    threshold = checkpoint["thresholds"][variant]
    return ((maps - mean) / (2 * threshold - mean)).clamp(0, 1).numpy()


def plot_heatmaps(cfg, rows, samples):
    """Draw rows {name: an image for each sample}, a column a sample."""
    figure = Figure(figsize=(1.1 * len(samples), 1.1 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(samples), squeeze=False)
    for line, (name, images) in zip(axes, rows.items()):
        line[0].set_ylabel(name)
        for ax, image in zip(line, images):
            ax.imshow(image, "inferno", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
    for ax, s in zip(axes[0], samples):
        ax.set_title(f"{s.cls[:14]}\n{('good', 'defective')[s.label]}", parse_math=False)
    figure.savefig(Path(cfg.out, "heatmaps.png"), dpi=120)


def images_to_score(cfg):
    """What predict is to score: images that are named, and those in folders that are named, except
    our own results. Raises UserError if there is none, or one that cannot be read."""
    own = {Path(cfg.out, name).resolve() for name in ("predict", *RESULTS)}
    samples = []
    others = []
    for place in map(Path, cfg.paths):
        if not place.is_dir():
            samples.append(Sample(place))
            continue
        for path in files_in(place, "**/*"):
            if not is_image(path):
                others.append(path)
            elif own.isdisjoint([path.resolve(), *path.resolve().parents]):
                samples.append(Sample(path))
    print(len(samples), "images;", len(others), "files not used", *others[:1], file=sys.stderr)
    if not samples:
        raise UserError(f"no image to score in {', '.join(cfg.paths)}; name some")
    check_files(samples)
    return samples


def write_predictions(cfg, samples, batches, checkpoint, variant):
    """For each sample a line of JSON, and the image with its map on it: clear where the map is as
    low as normal ones are on average, hottest from twice the threshold on. batches: the maps
    (B, S, S), computed as they are needed."""
    folder = Path(cfg.out, "predict")
    folder.mkdir(parents=True, exist_ok=True)
    threshold = checkpoint["thresholds"][variant]
    maps = (amap for batch in batches for amap in batch)
    for number, (sample, amap) in enumerate(zip(samples, maps)):
        score = image_score(amap[None]).item()
        values = heat(amap, checkpoint, variant)
        # (S, S, 4): the colder, the more transparent
        colours = colormaps["inferno"](values, alpha=0.8 * values, bytes=True)
        image = load_image(sample.path)
        overlay = Image.fromarray(colours).resize(image.size)
        image.paste(overlay, mask=overlay)
        target = folder / f"{number:04}-{sample.path.stem[:50]}.png"  # names have a limit
        image.save(target)
        print(json.dumps({"path": str(sample.path), "score": score, "threshold": threshold,
                          "anomalous": score > threshold, "overlay": str(target)}))
# ==== end shared


# ==== shared: command line and device
SCRIPT = Path(__file__).name
HERE = Path(__file__).resolve().parent
# torchrun says which of its processes this is, and of how many. Clusters set the same variables for
# other purposes, so they count only under torchrun.
UNDER_TORCHRUN = distributed.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if UNDER_TORCHRUN else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if UNDER_TORCHRUN else 1


class UserError(Exception):
    """A mistake that the user can mend. main() prints its one line and ends with exit code 2."""


def read_command_line(argv):
    """The settings, and the checkpoint, or None if none is to be read. Raises UserError for a
    checkpoint that cannot be used, and for settings that are impossible.

    tyro makes a flag of each field of Config, and its help of the comment beside it. A flag
    overrides all but what --cnc takes over. Settings without a flag come from

        train, on data/demo       DEMO, and for the rest the defaults of Config
        train, on other data      the defaults of Config
        eval, predict, --resume   the checkpoint; --out is its folder

    so the command line is read twice: first to learn which of these it is.
    """
    cfg = tyro.cli(Config, args=argv)
    checkpoint = None
    if cfg.command == "train" and not cfg.resume:
        places = [HERE / "data" / name for name in ("mvtec", "visa", "demo")]
        data = cfg.data or str(next(filter(Path.is_dir, places), places[-1]))
        demo = Path(data).resolve() == HERE / "data/demo"
        defaults = Config(data=data, **DEMO if demo else {})
    else:
        path = Path(cfg.checkpoint or Path(cfg.out, "checkpoint.pt"))
        checkpoint = read_checkpoint(path, SCRIPT)
        defaults = Config(**checkpoint["config"] | {"out": str(path.parent)})

    cfg = tyro.cli(Config, args=argv, default=defaults)
    check_settings(cfg)
    if checkpoint:
        for name in FIXED:
            if getattr(cfg, name) != getattr(defaults, name):
                raise UserError(f"--{name}: the checkpoint has another value; drop the flag")
        if cfg.command != "train" and not checkpoint["thresholds"]:
            raise UserError("the checkpoint's training has not finished: --resume it")
    return cfg, checkpoint


def check_settings(cfg):
    """Raises UserError for settings that would otherwise fail late, or not at all."""
    if (cfg.command == "predict") != bool(cfg.paths):
        raise UserError(f"{cfg.command}: name images after predict, and only there")
    if cfg.command == "train" and cfg.checkpoint and not cfg.resume:
        raise UserError("--checkpoint: is for eval, predict and --resume")
    if UNDER_TORCHRUN and (cfg.command != "train" or cfg.batch_size % WORLD_SIZE):
        raise UserError(f"torchrun: is for training, --batch-size a multiple of {WORLD_SIZE}")
    for name, (least, most) in RANGES.items():
        if not least <= getattr(cfg, name) <= most:
            raise UserError(f"--{name}: give a number from {least} to {most}")
    cfg.check()


def choose_device(name):
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


def autocast(x, dtype):
    """A context in which matrix products and convolutions run in half precision, if x is on a GPU
    that can. [ours] D11

    Elsewhere it does nothing: not every CPU has a fast half precision, and a V100 only emulates
    bfloat16.
    """
    able = dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", dtype, enabled=x.is_cuda and able)


def main(argv=None):
    """Run the command line. Returns the exit code: 0, 2 after a mistake of the user's, told in one
    line, or 130 after Ctrl-C."""
    code = 2
    try:
        run(argv)
        return 0
    except KeyboardInterrupt:
        code = 130
        error = "interrupted; --resume goes on with a training from its last checkpoint"
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
