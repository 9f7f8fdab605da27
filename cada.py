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

paper                                        here
  RevDist, the base detector [paper]           Teacher, Student, RevDist
  cosine loss per flattened layer [author]     RevDist.forward
  anomaly map A [author]                       RevDist.describe
  prediction of (u, gamma) [paper]             CADA.fit, CADA.predict; [ours] D5
  alignment A' [author]                        normalise
  Fig. 4(a): label known (oracle)              train, score [ours] D7
  absolute-unified evaluation [paper]          "pooled" in summarise

Read it from the top: the method comes first, in the order in which an image passes through it,
then training and evaluation. What stands between `shared` banners is in cnc.py letter for letter.

    python cada.py                                     train and evaluate; without data/mvtec and
                                                       data/visa on the small set in data/demo
    python cada.py --data DIR                          on MVTec AD, VisA, or a tree of your own
    python cada.py eval --checkpoint FILE              the same numbers again
    python cada.py predict --checkpoint FILE PATH ...  score images, write heat maps
    python cada.py --base cnc [--checkpoint FILE]      on top of CNC (cnc.py), trained or to train
    torchrun --nproc-per-node=N cada.py ...            train on N GPUs

Measured on the demo set: random ResNet-18, 2 CPU cores, about a minute a run, seeds 0-2, I-AUROC
in %: pooled raw 66.7 +- 1.3, CADA 80.9 +- 2.8, label oracle 80.9 +- 2.9; class mean 82.5 +- 2.1,
82.3 +- 1.6, 82.5 +- 2.1; on CNC, pooled raw 86.5 +- 1.5, CADA and oracle 90.0 +- 1.3. MVTec AD,
VisA and a GPU: not run here. ELPV, where it leaves maps alone, and all trials: data/RESULTS.md.
"""
from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from inspect import getsource
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy import ndimage
from sklearn.cluster import KMeans
from torch import Tensor, distributed, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import Compose, Normalize, Resize, ToTensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
RANK, COUNT = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun's


# ---- settings ------------------------------------------------------------------------------------
@dataclass
class Config:
    """Every setting is a flag, and the comment beside it is what --help says.

    The defaults are for MVTec AD and VisA: RevDist as CADA's first author trains it in public code,
    written for a sibling model [author].
    """

    # What replaces the defaults on the demo set, so that two CPU cores do it in minutes. [ours] D3
    DEMO = {"teacher": "resnet18", "weights": "none", "image_size": 128, "iters": 200, "workers": 0}
    VISA = {}  # as on MVTec AD
    data: str = ""  # data set folder; default: data/mvtec, else data/visa, else data/demo
    out: str = "runs/cada"  # folder for everything that is written
    seed: int = 0  # of weights, batches, hold-out and CADA's clusters
    device: str = "auto"  # where to run: cpu, cuda, mps, or auto: a GPU of NVIDIA's, else the CPU
    teacher: str = "wide_resnet50_2"  # frozen torchvision ResNet; the default is RD's
    weights: str = "IMAGENET1K_V1"  # its weights: torchvision tag, local file, or none (random)
    image_size: int = 256  # sides of the square that images are squashed to, in pixels, a multiple
    #                        of 32, since the one-class code has 1/32 of them; 256 is RD's
    batch_size: int = 16  # images a training step [author], of torchrun's processes together
    iters: int = 5000  # training steps of the detector [author]
    lr: float = 2e-3  # AdamW learning rate, x 0.2 at 80 % of iters [author]
    loss: str = "flat"  # cosine of each layer as a whole, flat [author], or position by position,
    #                     position [ours] D8
    holdout: float = 0.1  # share of the training images kept back for the threshold; 0: none
    quantile: float = 0.99  # share of normal images that the threshold shall let pass [ours] D1
    threshold: float = None  # of predict, above 0, if not the checkpoint's
    cache: str = "on"  # on: the teacher's features of the training images are computed once, into
    #                    an unnamed file in --out; off: anew in every step [ours] D2
    workers: int = 4  # processes that read images, at most one a CPU core
    checkpoint: str = ""  # what eval, predict and --resume read (default: checkpoint.pt in --out);
    #                       if given without --resume, what a training starts from
    resume: bool = False  # go on with an interrupted training

    def __post_init__(self) -> None:
        """Raise UserError for a value that cannot work."""
        for name, fits in {
                "iters": self.iters > 0, "seed": self.seed >= 0, "workers": self.workers >= 0,
                "batch_size": self.batch_size > 0 == self.batch_size % COUNT,
                "image_size": self.image_size > 0 == self.image_size % 32,
                "loss": self.loss in ("flat", "position"), "holdout": 0 <= self.holdout < 1,
                "lr": self.lr > 0, "threshold": self.threshold is None or self.threshold > 0,
                "quantile": 0 < self.quantile <= 1, "cache": self.cache in ("on", "off")}.items():
            if not fits:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: see --help")


# ---- frozen teacher ------------------------------------------------------------------------------
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
        self.random = weights == "none"
        with torch.random.fork_rng(devices=[]):  # a seed's teacher is the same whatever ran before
            torch.manual_seed(seed)
            try:
                resnet = getattr(torchvision.models.resnet, name)(weights=None)
                if not self.random:
                    resnet.load_state_dict(
                        torch.load(weights, map_location="cpu", weights_only=True)
                        if Path(weights).is_file() else
                        torchvision.models.get_model_weights(name)[weights].get_state_dict())
            except Exception as e:  # unknown, no network, weights that do not fit: many kinds
                raise UserError(f"--teacher {name} --weights {weights}: {str(e)[:200]}; give a "
                                "ResNet of torchvision's and a tag or file of its weights, or none")
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.layer1, self.layer2, self.layer3 = resnet.layer1, resnet.layer2, resnet.layer3
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
        return [f.half() for f in (f1, f2, f3)]

    def estimate_statistics(self, batches: Iterable) -> None:
        """Give a random teacher the BatchNorm statistics of the training images. [ours] D3

        Fresh statistics (mean 0, variance 1) let the activations of a random ResNet drift from
        layer to layer until all images look alike.
        """
        layers = nn.Sequential(self.stem, self.layer1, self.layer2, self.layer3).eval()
        torch.optim.swa_utils.update_bn(batches, layers)  # in train mode, and back to eval


# ---- RevDist student -----------------------------------------------------------------------------
def residual_stage(like: ResNet, inputs: int, planes: int, depth: int, up: bool) -> nn.Sequential:
    """`depth` residual blocks as those of `like`; the first halves or doubles height and width:
    (B, inputs, H, W) -> (B, planes x the block's expansion, H/2, W/2), or (..., 2H, 2W) if `up`.

    A stage that doubles is the teacher's mirrored: where the teacher's first block has a stride-2
    convolution, in the main path and in the shortcut, this one has a 2x2 transposed one.
    """
    like.inplanes, block = inputs, type(like.layer1[0])
    stage = like._make_layer(block, planes, depth, stride=2)
    strided = "conv1" if block is BasicBlock else "conv2"
    for parent, name in ((stage[0], strided), (stage[0].downsample, "0")) if up else ():
        c = getattr(parent, name)
        setattr(parent, name, nn.ConvTranspose2d(c.in_channels, c.out_channels, 2, stride=2,
                                                 groups=c.groups, bias=False))
    return stage


class Student(nn.Module):
    """What RevDist trains, in RD's shapes: fusion, one-class bottleneck (OCBE), mirrored decoder.

    forward: the teacher's [(B, C1, S/4, S/4), (B, C2, S/8, S/8), (B, C3, S/16, S/16)] -> the same
    shapes, reproduced from a code of (B, 2 * C3, S/32, S/32). The code is the bottleneck: a
    fourteenth of the numbers to reproduce. Only the shapes mirror the teacher's: weights start at
    random, so that nothing but training can make the two agree.
    83.80 M parameters for wide_resnet50_2: fusion 10.62, bottleneck 48.26, decoder 24.92.
    """

    def __init__(self, teacher_name: str) -> None:
        super().__init__()
        with torch.device("meta"):  # only its layout is read, so no memory is spent on it
            like = torchvision.models.get_model(teacher_name, weights=None)
        e = type(like.layer1[0]).expansion
        c1, c2, c3 = 64 * e, 128 * e, 256 * e
        halve = partial(torchvision.ops.Conv2dNormActivation, kernel_size=3, stride=2)
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
    What level it fails at on *normal* images differs from class to class: a regular wire grid is
    easy to reproduce and granite is not. That is the problem that CADA solves.

    This is all that CADA and the shared code need of a detector: `preprocess` for images, `teacher`
    for frozen features of them; called, it gives the loss on these, and `describe` turns them into
    pooled features and a raw anomaly map.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg, self.size = cfg, (cfg.image_size, cfg.image_size)
        # An image that is not square is squashed [ours] D19; mean and deviation are ImageNet's.
        self.preprocess = Compose([Resize(self.size), ToTensor(), Normalize(
            (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
        self.teacher = Teacher(cfg.teacher, cfg.weights, cfg.seed)
        self.student = Student(cfg.teacher)

    def decode(self, features: list[Tensor]) -> tuple[list, list]:
        """The student's version of the teacher's features, both in float32 for the cosines."""
        # channels_last, like the weights: cuDNN's own layout (on a CPU no difference was measured).
        encoded = [f.float().contiguous(memory_format=torch.channels_last) for f in features]
        with autocast(features[0], torch.bfloat16):
            decoded = self.student(encoded)
        return encoded, [d.float() for d in decoded]

    def forward(self, features: list[Tensor]) -> Tensor:
        """The loss: sum over layers of 1 - cosine, each layer one long vector of C*H*W [author], or
        by position and averaged (--loss position) [ours] D8. Returns a scalar in 0..6.

        Flat, a position counts by the length of its features; by position all count alike, as in
        the anomaly map: 1.6 better on the demo set, within the spread over seeds."""
        # Flatten (B, C, H, W) from C on, to one vector an image, or from H on, to one a position.
        start = 1 if self.cfg.loss == "flat" else 2
        return sum((1 - F.cosine_similarity(e.flatten(start), d.flatten(start), dim=1)).mean()
                   for e, d in zip(*self.decode(features)))

    def describe(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Teacher features -> (pooled (B, 2 * (C1+C2+C3)), raw anomaly map (B, S, S) in 0..2).

        Pooled over the whole image, frozen features tell the class more than the defect: that is
        why CADA reads these and not the student's. Mean *and* standard deviation over the positions
        [ours] D6: with the mean alone, brightness drowns texture. align_corners=True [author] puts
        the corner values of a layer's map on the corner pixels, so the three layers line up.
        """
        maps = 0
        for e, d in zip(*self.decode(features)):
            m = 1 - F.cosine_similarity(e, d, dim=1)[:, None]  # (B, 1, h, w)
            maps = maps + F.interpolate(m, self.size, mode="bilinear", align_corners=True)[:, 0] / 3
        pooled = [t for f in features for t in torch.std_mean(f.float(), dim=(2, 3))]
        return torch.cat(pooled, dim=1), maps


# ---- CADA ----------------------------------------------------------------------------------------
@dataclass
class CADA:
    """Predict (u, gamma), the mean and the maximum that anomaly maps of *normal* images of an
    image's class have, from its frozen features; normalise its map by them. [paper]

    The hard part: it must predict the statistics of a class, not of an image. A network trained on
    every image's own statistics learns the image's quirks, and a defect that moves the features
    takes u and gamma with it, which cancels the very signal. So our regressor is piecewise constant
    [ours] D5: k-means finds *implicit classes* of the training set in feature space, as many as
    help to predict the statistics of images that it has not seen, and an image gets the mean
    statistics of its nearest centre. A defect then changes nothing unless it carries the pooled
    features over to another centre; and within an implicit class all images share one affine map,
    so their order stays.

    It knows nothing of the detector: any that has pooled features and maps will do.
    """

    mean: Tensor  # (C,) of the training images' pooled features
    std: Tensor  # (C,)
    centres: Tensor  # (k, C) of the implicit classes
    statistics: Tensor  # (k, 2): u and gamma of each

    @classmethod
    def fit(cls, features: Tensor, maps: Tensor, seed: int = 0) -> CADA:
        """Learn from normal images: pooled features (N, C) and raw maps (N, H, W), float tensors on
        the CPU. No label, no gradient."""
        cada = cls(features.mean(0), features.std(0, correction=0) + 1e-6, None, None)
        statistics = map_statistics(maps)
        kmeans = implicit_classes(cada.direction(features).numpy(), statistics.numpy(), seed)
        labels = torch.from_numpy(kmeans.labels_)
        cada.centres = torch.from_numpy(kmeans.cluster_centers_).float()
        cada.statistics = torch.stack([statistics[labels == k].mean(0)
                                       for k in range(len(cada.centres))])
        return cada

    def direction(self, features: Tensor) -> Tensor:
        """(N, C) -> unit vectors (N, C): standardised, or the largest channels would decide alone;
        and without length, so that the size of a defect counts for less. [ours] D6"""
        return F.normalize((features - self.mean) / self.std)

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) -> u (N,) and gamma (N,), gamma > u: those of the nearest implicit class."""
        distance = torch.cdist(self.direction(features), self.centres,
                               compute_mode="donot_use_mm_for_euclid_dist")  # same in any batch
        return self.statistics[distance.argmin(1)].unbind(1)


def implicit_classes(x: np.ndarray, statistics: np.ndarray, seed: int) -> KMeans:
    """k-means of feature directions (N, C) for the k that predicts map statistics (N, 2) of images
    held out, by 5-fold cross-validation on 2,000 images at most. [ours] D5

    That is plain regression: a held-out image gets the mean of its nearest centre, and what counts
    is the squared error on a logarithmic scale, since alignment must get a factor right. Taken is
    the smallest k that explains 99 % of what any explains. But where none explains half of the
    variance, features do not tell how normal maps differ, and had better leave them alone: k = 1.

    Else it errs towards too many clusters, where a defect may look like another centre. The
    silhouette, blind to maps, errs the other way: of classes in groups it finds the groups.
    """
    rows = np.random.default_rng(seed).permutation(len(x))[:2000]
    sample, (u, gamma) = x[rows], statistics[rows].T
    scale = np.median(gamma - u)
    y = np.stack([np.arcsinh(u / scale),  # like log u, but u may be zero or negative
                  np.log(np.maximum(gamma - u, 1e-3 * scale))], axis=1)
    most = len(np.unique(sample, axis=0)) // 4  # four images to a centre, copies not counted
    errors = {k: 0.0 for k in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40) if k <= most}
    for k, fold in product(errors, range(5)) if most > 1 else ():
        held = np.arange(len(y)) % 5 == fold
        model = KMeans(k, n_init=1, random_state=seed).fit(sample[~held])
        means = np.stack([y[~held][model.labels_ == c].mean(0) for c in range(k)])
        errors[k] += np.square(y[held] - means[model.predict(sample[held])]).sum()
    best = min(errors.values(), default=0.0)
    k = next((k for k, error in errors.items()
              if best < errors[1] / 2 and error - best <= 0.01 * (errors[1] - best)), 1)
    return KMeans(k, n_init=3, random_state=seed).fit(x)


def map_statistics(maps: Tensor) -> Tensor:
    """(N, H, W) -> (N, 2): u, the mean, and gamma, the maximum, of each map; gamma > u even for a
    map without contrast."""
    u = maps.mean((1, 2))
    return torch.stack([u, maps.amax((1, 2)).maximum(u + 1e-6 * u.abs().clamp(min=1))], dim=1)


def normalise(maps: Tensor, u: Tensor, gamma: Tensor) -> Tensor:
    """A' = (A - u) / (gamma - u), image by image: (N, H, W), (N,), (N,) -> (N, H, W). [author]

    0 is the mean of normal maps of the class, 1 their maximum, whatever the class."""
    return (maps - u[:, None, None]) / (gamma - u)[:, None, None]


# ==== shared: map and score
def smooth(maps: Tensor) -> Tensor:
    """Gaussian blur of (N, H, W) maps, sigma 4 pixels at 256 x 256 and in proportion elsewhere
    [ours] D4.

    Edges are repeated ("nearest") and the kernel sums to one, so a constant map stays constant: the
    blur commutes with (A - u) / (gamma - u), and normalising first [author] or after is the same.
    """
    sigma = 0, maps.shape[-1] / 64, maps.shape[-1] / 64
    return torch.from_numpy(ndimage.gaussian_filter(maps.numpy(), sigma, mode="nearest"))


def image_score(maps: Tensor) -> Tensor:
    """Mean of the highest 1 % of the pixels of each map, steadier than the maximum: (N, H, W) ->
    (N,). [author]"""
    return maps.flatten(1).topk(max(1, maps[0].numel() // 100), dim=1).values.mean(1)


def hold_out(cfg: Config, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Normal images to train on, and those kept back, at random, for the threshold: the decoder
    knows the former too well. With --holdout 0 both are all, as in the papers. [ours] D1"""
    order = np.random.default_rng(cfg.seed).permutation(len(samples)).tolist()
    n = min(round(cfg.holdout * len(samples)), len(samples) - 1)
    kept, held = ([samples[i] for i in sorted(part)] for part in (order[n:], order[:n]))
    return kept, held or kept


def threshold(cfg: Config, maps: Tensor) -> float:
    """The conformal threshold: the ceil((n + 1) q)-th smallest of the scores of n normal images, or
    the largest. A new normal image lies above with a probability of at most 1 - q, if n allows and
    nothing has learned from these n (CADA's statistics have, a little). [ours] D1"""
    scores, rank = image_score(maps).sort().values, math.ceil((len(maps) + 1) * cfg.quantile)
    return scores[min(rank, len(scores)) - 1].item()


@torch.no_grad()
def look(detector: nn.Module, samples: list[Sample], view: Callable) -> list[Tensor]:
    """Show images to the frozen teacher and its features to `view`, detector.describe for instance.
    Returns the tensors (N, ...) that it answers with, on the CPU."""
    detector.eval()  # BatchNorm by its running statistics: a score must not depend on its batch
    found = [[t.cpu() for t in view(detector.teacher(x))]
             for x in image_batches(detector, samples)]
    return [torch.cat(parts) for parts in zip(*found)]
# ==== end shared


# ---- training ------------------------------------------------------------------------------------
def build(cfg: Config, content: dict) -> RevDist:
    """The detector on its device, with the weights of a checkpoint if one is given."""
    torch.manual_seed(cfg.seed)
    detector = RevDist(cfg)
    if content:  # strict=False: the weights of a trained teacher are not in it
        detector.load_state_dict(content["weights"], strict=False)
    if detector.teacher.random:
        print("teacher: RANDOM weights; its numbers are not the paper's", file=sys.stderr)
    return detector.to(choose_device(cfg.device), memory_format=torch.channels_last)


def train_detector(detector: RevDist, samples: list[Sample], content: dict) -> dict:
    """Train on normal images, from where `content` (a checkpoint's, or {}) stopped. Returns the new
    content of a checkpoint; {} in all but the first process of torchrun, whose work ends here.
    Raises UserError on a NaN loss.

    Only the student learns: the teacher's features are computed without gradients, and its
    BatchNorm stays in eval mode. The student's BatchNorm learns its statistics here. All classes
    are mixed in every batch, and nobody tells the student which image is of which (model-unified).
    There is no validation and no best epoch, which could only be chosen on test images: the last
    step counts.
    """
    cfg, student, share = detector.cfg, detector.student, samples[RANK::COUNT]
    step, engine = content.get("step", 0), detector
    if step == cfg.iters:  # trained already: no features are needed
        return {} if RANK else content
    if detector.teacher.random and not content:  # of all images: the same in every process
        detector.teacher.estimate_statistics(image_batches(detector, samples))
    features = teacher_features(detector, share)
    # Optimiser and schedule: [author], written for a sibling model.
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr, weight_decay=1e-5, amsgrad=True,
                                  fused=True)
    if content:
        optimizer.load_state_dict(content["optimizer"])
    if COUNT > 1:  # the gradient is the mean over all processes, whose batches are equally large
        if next(student.parameters()).is_cuda:  # on CPUs each normalises by its own batch
            nn.SyncBatchNorm.convert_sync_batchnorm(student)
        distributed.init_process_group()
        engine = nn.parallel.DistributedDataParallel(detector)
    detector.train()
    batches = shuffled(len(share), cfg.batch_size // COUNT, cfg.iters, cfg.seed)[step:]
    bar = tqdm(features(batches), "training", cfg.iters, initial=step, disable=None)
    for batch in bar:
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 if step < int(0.8 * cfg.iters) else 0.2)
        loss = engine(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        due = step % max(1, cfg.iters // 10) == 0 or step == cfg.iters
        if due or step % 20 == 0:  # seldom: item() waits for the GPU
            bar.set_postfix(loss=f"{loss.item():.4f}")
            if not math.isfinite(loss.item()):
                raise UserError(f"the loss is {loss.item()} at step {step}; lower --lr {cfg.lr}")
        if due and RANK == 0:
            content = {"step": step, "optimizer": optimizer.state_dict()}
            save_checkpoint(detector, content)
    if COUNT > 1:
        distributed.destroy_process_group()
    return {} if RANK else content


def train(fit: Callable, detector: nn.Module, samples: list[Sample], content: dict) -> dict:
    """Train a detector by `fit` on normal images, from where a checkpoint's content stopped; then
    CADA, whose statistics come from all of them: from those kept back alone it loses 3 to 5 points
    of pooled I-AUROC on the demo set. Returns the content of the checkpoint that it leaves in
    --out, {} in the further processes of torchrun."""
    kept, held = hold_out(detector.cfg, samples)
    content = fit(detector, kept, content)
    if content:
        features, maps = look(detector, samples, detector.describe)
        content["cada"] = vars(CADA.fit(features, maps, detector.cfg.seed))
        # The label oracle, Fig. 4(a): class means over the training images. [ours] D7
        statistics, classes = map_statistics(maps), np.array([s.cls for s in samples])
        content["oracle"] = {c: statistics[classes == c].mean(0) for c in set(classes.tolist())}
        content["thresholds"] = {v: threshold(detector.cfg, m) for v, m in
                                 score(detector, content, held).items() if v != "oracle"}
        save_checkpoint(detector, content)
    return content


# ---- evaluation ----------------------------------------------------------------------------------
def score(detector: nn.Module, content: dict, samples: list[Sample]) -> dict[str, Tensor]:
    """Smoothed anomaly maps of images, (N, S, S) each: raw, aligned by the true class's statistics
    (oracle) if all these classes are known, and aligned by CADA.

    What to look for: "pooled" should rise from raw to cada, and the oracle shows how far it could.
    "class mean" should stay: within a class alignment has nothing to gain, so where it falls, the
    head has taken the image's defect for its class, and does harm.
    """
    features, maps = look(detector, samples, detector.describe)
    maps = smooth(maps)  # once for all three: aligning commutes with blurring
    variants, oracle = {"raw": maps}, content["oracle"]
    if {s.cls for s in samples} <= oracle.keys():
        known = torch.stack([oracle[s.cls] for s in samples])
        variants["oracle"] = normalise(maps, *known.unbind(1))
    u, gamma = CADA(**content["cada"]).predict(features)
    return variants | {"cada": normalise(maps, u, gamma)}


def plot_scores(out: str, samples: list, thresholds: dict, scores: dict, results: dict) -> None:
    """Score histograms by class, normal above the line and anomalous below it, each drawn to the
    same height, of each variant that has a threshold.

    Where the normal scores of all classes end at the same place, one threshold serves them all.
    """
    labels, classes = (np.array([getattr(s, what) for s in samples]) for what in ("label", "cls"))
    names = sorted(set(classes), reverse=True)  # upwards, as the axis goes
    figure = Figure(figsize=(12, 1.6 + 0.6 * len(names)), layout="constrained")
    for ax, (v, t) in zip(figure.subplots(1, len(thresholds), sharey=True), thresholds.items()):
        x = scores[v].numpy()
        bins = np.linspace(x.min(), max(np.quantile(x, 0.98), t) + 1e-9, 40)
        for row in range(len(names)):
            # Okabe and Ito's blue and vermilion, told apart by colour-blind readers too.
            for label, side, colour in ((0, 0.42, "#0072B2"), (1, -0.42, "#D55E00")):
                found = x[(classes == names[row]) & (labels == label)].clip(None, bins[-1])
                counts = np.histogram(found, bins)[0]
                ax.stairs(row + side * counts / max(counts.max(), 1), bins, baseline=row, fill=True,
                          color=colour, label=("normal", "anomalous")[label])
        line = ax.axvline(t, color="black", linestyle="--", label="threshold")
        ax.set_yticks(range(len(names)), names, fontsize=12)
        ax.set_title(f"{v}: pooled I-AUROC {results[v]['pooled'].get('I-AUROC', math.nan):.1%}")
        ax.set_xlabel("image score (last bin: that and above)", fontsize=11)
    figure.legend(handles=[*ax.patches[:2], line], loc="outside lower center", ncols=3)
    figure.savefig(Path(out, "distributions.png"), dpi=150, bbox_inches="tight")


# ==== shared: fitting a detector
def teacher_features(detector: nn.Module, samples: list[Sample]) -> Callable:
    """Returns a function from lists of indices to the teacher's features of these images, yielded
    list by list. They are computed once [ours] D2, or with --cache off anew in every step.

    Training uses no augmentation, so every epoch would compute the same again. They stay in one
    float16 array (N, values per image) in an unnamed file in --out: the system keeps as much of it
    in memory as fits, and it goes with the process, even a killed one, so it can never be stale.
    Raises UserError if the disk is too small.
    """
    teacher, folder = detector.teacher, detector.cfg.out
    if detector.cfg.cache == "off":
        return lambda batches: map(teacher, image_batches(detector, samples, batches))
    first = teacher(next(image_batches(detector, samples[:1])))
    shapes, sizes = [f.shape[1:] for f in first], [f[0].numel() for f in first]
    file, space = tempfile.TemporaryFile(dir=folder), 2 * len(samples) * sum(sizes)
    if shutil.disk_usage(folder).free < space:
        raise UserError(f"--cache on: {folder} lacks {space / 2**30:.1f} GiB; use --cache off")
    for x in image_batches(detector, samples):  # written and then mapped: a full disk says so
        torch.cat([f.flatten(1) for f in teacher(x)], dim=1).cpu().numpy().tofile(file)
    array = np.memmap(file, np.float16, "r", shape=(len(samples), sum(sizes)))

    def load(rows: list[int]) -> list[Tensor]:
        values = torch.from_numpy(array[rows])
        if first[0].is_cuda:
            values = values.pin_memory()  # copied while the GPU computes
        parts = values.to(first[0].device, non_blocking=True).split(sizes, dim=1)
        return [p.unflatten(1, s) for p, s in zip(parts, shapes)]
    return partial(map, load)


def shuffled(n: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The batches of a whole training run, epoch after epoch, decided by seed and rank alone: so a
    resumed run goes on with exactly the batches that it would have had."""
    order = RandomSampler(range(n), num_samples=steps * batch_size,
                          generator=torch.Generator().manual_seed(seed + 1_000_000 * RANK))
    return [*BatchSampler(order, batch_size, drop_last=True)]


def save_checkpoint(detector: nn.Module, content: dict) -> None:
    """Write checkpoint.pt, plain tensors and values, whole or not at all: a kill leaves no half. A
    trained teacher is not in it, a random one is."""
    weights = {k: v for k, v in detector.state_dict().items()
               if detector.teacher.random or not k.startswith("teacher.")}
    path = Path(detector.cfg.out, "checkpoint.pt")
    torch.save(content | {"config": asdict(detector.cfg), "weights": weights}, f"{path}.partial")
    os.replace(f"{path}.partial", path)
# ==== end shared


# ==== shared: data
SUFFIXES = {s for s, f in Image.registered_extensions().items() if f in Image.OPEN}


@dataclass(frozen=True)
class Sample:
    """One image. `cls` serves the report and the oracle only; no model ever sees it."""

    path: Path
    cls: str = ""
    label: int = 0  # 1 anomalous: from the folder (a resized mask can lose a tiny defect)
    mask: Path | None = None


def images_in(folder: Path, pattern: str = "*") -> list[Path]:
    """Image files in name order, without hidden ones (macOS leaves some)."""
    return sorted(p for p in folder.glob(pattern)
                  if p.suffix.lower() in SUFFIXES and p.name[0] != ".")


def read_mvtec(root: Path) -> tuple[list[Sample], list[Sample]]:
    """Read an MVTec-style tree, <class>/{train/good,test/<kind>,ground_truth/<kind>}/*, or the
    folder of a single class. A mask goes with the image of its stem, `000_mask` or `000` with
    `000`; sort order decides nothing. Raises UserError where one lacks the other."""
    classes = [root] if (root / "train").is_dir() else [p.parent for p in root.glob("*/train")]
    has_masks, train, test = any(images_in(d, "ground_truth/*/*") for d in classes), [], []
    for d in sorted(classes):
        normal = images_in(d / "train/good")
        if not normal:
            raise UserError(f"no training images in {d / 'train/good'}; put normal images there")
        train += [Sample(p, d.name) for p in normal]
        for kind in sorted({p.name for p in (*d.glob("test/*"), *d.glob("ground_truth/*"))}):
            images, masks = (images_in(d / part / kind) for part in ("test", "ground_truth"))
            masks, label = {p.stem.removesuffix("_mask"): p for p in masks}, int(kind != "good")
            odd = masks.keys() ^ {p.stem for p in images}
            if odd and label and has_masks:
                raise UserError(f"{d / 'ground_truth' / kind}: no mask for, or no image of, {kind}/"
                                f"{min(odd)}; add it, or remove all ground_truth")
            test += [Sample(p, d.name, label, masks.get(p.stem)) for p in images]
    return train, test


def read_visa(root: Path) -> tuple[list[Sample], list[Sample]]:
    """Read the raw VisA archive by its own split file."""
    splits = {"train": [], "test": []}
    with open(root / "split_csv/1cls.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            label, mask = int(row["label"] != "normal"), root / row["mask"]
            splits[row["split"]].append(Sample(root / row["image"], row["object"], label,
                                               mask if label else None))
    return splits["train"], splits["test"]


def read_dataset(root: Path) -> tuple[list[Sample], list[Sample]]:
    """(train, test) samples of a data set. Every file is decoded: a broken one must stop the run
    before the training and not after. Raises UserError that says what is wrong."""
    def check(s: Sample) -> None:
        width, height = load_image(s.path).size
        if s.mask and load_image(s.mask, mask=True).size != (width, height):
            raise UserError(f"mask {s.mask} is not as large as its image ({width} x {height})")
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder")
    train, test = (read_visa if (root / "split_csv/1cls.csv").is_file() else read_mvtec)(root)
    if not train:
        raise UserError(f"--data {root}: no training images; put them in <class>/train/good")
    with ThreadPoolExecutor() as pool:  # threads suffice: Pillow decodes without the GIL
        found = pool.map(check, train + test)
        list(tqdm(found, "checking images", len(train + test), False, disable=None))
    return train, test


def load_image(path: Path, mask: bool = False) -> Image.Image:
    """Any image file as 8-bit RGB, upright; a mask with one channel, 0 where there is no defect.
    Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
    except Exception as e:  # Pillow's readers raise many kinds for a broken file
        raise UserError(f"cannot read image {path}: {e}; repair, replace or remove it")
    if mask and len(image.getbands()) == 1:  # VisA's are indices 1-9
        return image
    if image.mode.startswith("I"):  # 16-bit grey: convert() alone would clip it to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB").convert("L" if mask else "RGB")


def load_masks(samples: list[Sample], size: int) -> Tensor | None:
    """Ground truth as (N, size, size) bool, or None for a set without masks.

    Binarised first and resized (nearest neighbour) after: the other way round thin defects blur.
    """
    masks = np.zeros((len(samples), size, size), bool)
    for mask, s in zip(masks, samples):
        if s.mask:
            full = Image.fromarray(np.asarray(load_image(s.mask, mask=True)) != 0)
            mask[:] = full.resize((size, size), Image.NEAREST)
    return torch.from_numpy(masks) if any(s.mask for s in samples) else None


def load_batch(preprocess: Callable, samples: list[Sample]) -> Tensor:
    """Images -> (B, 3, S, S)."""
    return torch.stack([preprocess(load_image(s.path)) for s in samples])


def image_batches(detector: nn.Module, samples: list[Sample], rows: list | None = None) -> Iterator:
    """Yield preprocessed images (B, 3, S, S), in order or by lists of indices, on the detector's
    device. The loader's generator is its own: it must draw nothing from the one of training."""
    cfg, device = detector.cfg, next(detector.parameters()).device
    how = {"batch_size": cfg.batch_size} if rows is None else {"batch_sampler": rows}
    loader = DataLoader(samples, collate_fn=partial(load_batch, detector.preprocess), **how,
                        num_workers=min(cfg.workers, os.cpu_count() or 1),
                        pin_memory=device.type == "cuda", generator=torch.Generator())
    for x in tqdm(loader, "images", disable=None if rows is None else True, leave=False):
        yield x.to(device, memory_format=torch.channels_last, non_blocking=True)
# ==== end shared


# ==== shared: metrics
def ranking_metrics(kind: str, values: Tensor, positive: Tensor) -> dict[str, float]:
    """<kind>-AUROC, -AP and -F1max in 0..1 of values (N, ...) with bool labels of the same shape;
    for pixels, kind "P", (N, H, W), also AUPRO. {} if one label is missing.

    All come from one sort, and every distinct value is a threshold. True positives change only at
    values of positives, which are few among pixels: these alone give the exact curves, if one knows
    how many values lie above each. AUPRO is the mean overlap with the 8-connected regions of the
    ground truth against the pixel false-positive rate, up to 0.3. Sums are float64: float32 loses
    integers above 2^24. Memory: 12 bytes a pixel if 2 % are anomalous, 20 if 7 %.
    """
    n, positives = values.numel(), int(positive.sum())
    if not 0 < positives < n:
        return {}
    every = torch.from_numpy(np.sort(values.numpy(), axis=None))  # NumPy's is the fastest sort here
    at, order = values[positive].sort(descending=True)
    ends = torch.cat([at[1:] != at[:-1], torch.tensor([True])])  # of runs of equal values
    tp = ends.nonzero()[:, 0].double() + 1
    flagged, before = (n - torch.searchsorted(every, at[ends], right=right).double()
                       for right in (False, True))  # values >= and > each threshold
    rise = tp.diff(prepend=tp.new_zeros(1))
    start, end = (before - tp + rise) / (n - positives), (flagged - tp) / (n - positives)

    def area(rise: Tensor, limit: float) -> float:
        """Under the curve that rises so much, on straight lines, while the false-positive rate goes
        from `start` to `end`: each rise counts over what is left from there to `limit`."""
        b, e = (limit - start).clamp(min=0), (limit - end).clamp(min=0)
        inside = torch.where(end > start, (b - e) / (end - start), 1)  # the part below the limit
        return (rise * inside * (b + e) / 2).sum().item()
    found = {f"{kind}-AUROC": area(rise / positives, 1.0),
             f"{kind}-AP": (rise * tp / flagged).sum().item() / positives,
             f"{kind}-F1max": (2 * tp / (flagged + positives)).max().item()}
    if kind == "P":
        touch = np.zeros((3, 3, 3)) + [[[0]], [[1]], [[0]]]  # 8 neighbours, none in another image
        region = ndimage.label(positive.numpy(), touch)[0][positive.numpy()]
        weights = torch.from_numpy(1 / np.bincount(region)[region])  # each region weighs 1 in all
        overlap = weights[order].cumsum(0)[ends] / weights.sum()
        found["AUPRO"] = area(overlap.diff(prepend=overlap.new_zeros(1)), 0.3) / 0.3
    return found


def summarise(scores: Tensor, labels: np.ndarray, classes: np.ndarray, maps: Tensor,
              masks: Tensor | None) -> dict[str, dict[str, float]]:
    """All metrics by both protocols: {class: {}, ..., "class mean": {}, "pooled": {}}.

    pooled: all classes in one ranking, as one threshold sees them (absolute-unified).
    class mean: a ranking per class, then the unweighted mean (model-unified), which allows each
    class a threshold of its own, so that a difference in level costs nothing. A class without good
    or without defective images has no such metric and does not count.
    """
    def metrics(rows: np.ndarray) -> dict[str, float]:
        found = ranking_metrics("I", scores[rows], torch.from_numpy(labels[rows]) == 1)
        return found if masks is None else found | ranking_metrics("P", maps[rows], masks[rows])
    found = {c: metrics(np.flatnonzero(classes == c)) for c in sorted(set(classes))}
    pooled = metrics(np.arange(len(scores)))
    values = {m: [f[m] for f in found.values() if m in f] for m in pooled}
    mean = {m: float(np.mean(v)) for m, v in values.items() if v}
    return found | {"class mean": mean, "pooled": pooled}
# ==== end shared


# ==== shared: report
def report(cfg: Config, content: dict, samples: list[Sample], maps: dict[str, Tensor],
           layers: dict) -> tuple[dict, dict]:
    """Write and print how well maps {variant: (N, S, S)} tell good from defective samples.
    Returns the image scores and the metrics, by variant.

    content["thresholds"]: {variant: threshold} of those to draw, the last of which decides; layers:
    more rows of plot_heatmaps(). No number here has been chosen by a test label, the maxima of F1
    apart, which say what the best threshold would have been.
    """
    thresholds = content["thresholds"]
    out, (name, threshold) = Path(cfg.out), [*thresholds.items()][-1]
    labels, classes = (np.array([getattr(s, what) for s in samples]) for what in ("label", "cls"))
    masks = load_masks(samples, maps[name].shape[-1])
    scores = {v: image_score(m) for v, m in maps.items()}
    results = {v: summarise(scores[v], labels, classes, m, masks) for v, m in maps.items()}
    flagged = (scores[name] > threshold).numpy()
    columns = scores | {"anomalous": flagged}
    with open(out / "scores.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "class", "label", *columns]] + [
            [s.path, s.cls, s.label, *(v.item() for v in values)]
            for s, *values in zip(samples, *columns.values())])
    (out / "metrics.json").write_text(json.dumps({
        "config": asdict(cfg), "thresholds": thresholds, "results": results}, indent=2) + "\n")
    plot_heatmaps(out / "heatmaps.png", samples, masks, {
        f"{v} map": (maps[v], 0, 2 * t, "inferno") for v, t in thresholds.items()} | layers)
    width, names = max(map(len, results[name])), results[name]["pooled"]
    print(" " * (width + 9) + "".join(f"{m:>9}" for m in names))
    for part, v in ((part, v) for part in results[name] for v in results):
        print(f"{part:<{width}}  {v:<7}" + "".join(
            f"{100 * results[v][part].get(m, math.nan):>9.1f}" for m in names))
    good, bad = flagged[labels == 0], flagged[labels == 1]
    print(f"threshold {threshold:.4f}: flags {good.sum()} of {len(good)} good and {bad.sum()} of "
          f"{len(bad)} defective test images; more in {out}")
    return scores, results


def plot_heatmaps(path: Path, samples: list[Sample], masks: Tensor | None, layers: dict) -> None:
    """A column a class: its middle good and its middle defective image (nobody picked them), each
    above its `layers`, {name: (maps (N, h, w), low, high, colours)}.

    Every row of maps has one fixed scale, the bar at its right: scaling each image by itself would
    paint good images red.
    """
    classes, lines = sorted({s.cls for s in samples}), []
    for label, kind in enumerate(("good", "defective")):
        rows_of = [[i for i, s in enumerate(samples) if (s.cls, s.label) == (c, label)]
                   for c in classes]
        shown = {k: rows[len(rows) // 2] for k, rows in enumerate(rows_of) if rows}
        images = {i: load_image(samples[i].path).resize((160, 160)) for i in shown.values()}
        truth = {"ground truth": (masks, 0, 1, "gray")} if label and masks is not None else {}
        lines += [(shown, *line) for line in (
            {f"{kind} image": (images, 0, 255, "gray")} | truth | layers).items() if shown]
    figure = Figure(figsize=(1.3 * len(classes) + 2, 1.3 * len(lines) + 0.3), layout="constrained")
    axes = figure.subplots(len(lines), len(classes), squeeze=False)
    for cells, (shown, name, (maps, low, high, colours)) in zip(axes, lines):
        for k, ax in enumerate(cells):
            ax.set(xticks=[], yticks=[], frame_on=False)
            if k in shown:
                drawn = ax.imshow(np.asarray(maps[shown[k]]), cmap=colours, vmin=low, vmax=high)
        cells[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=12)
        figure.colorbar(drawn, ax=[*cells], aspect=10).ax.set_visible(colours != "gray")
    for ax, name in zip(axes[0], classes):
        ax.set_title(name, fontsize=12)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


def write_predictions(cfg: Config, content: dict, paths: list[str], score: Callable) -> None:
    """For each image of PATH ... a line of JSON, and the image with its heat map on it.

    score: samples -> smoothed maps {variant: (N, S, S)}. A map's value of 0 is clear, twice the
    threshold the hottest, in every image: one fixed scale.
    """
    variant, threshold = [*content["thresholds"].items()][-1]
    threshold, cfg.workers = cfg.threshold or threshold, 0  # a process an image would cost more
    files = [p for path in map(Path, paths)
             for p in (images_in(path, "**/*") if path.is_dir() else [path])]
    if not files:
        raise UserError(f"no images in {', '.join(paths)}; name an image or a folder of images")
    folder = Path(cfg.out, "predict")
    folder.mkdir(parents=True, exist_ok=True)
    for i, path in enumerate(files):
        amap, image = score([Sample(path)])[variant], load_image(path)
        value, heat = image_score(amap).item(), (amap[0] / (2 * threshold)).clamp(0, 1).numpy()
        overlay = Image.fromarray(colormaps["inferno"](heat, alpha=0.8 * heat, bytes=True))
        overlay, target = overlay.resize(image.size), folder / f"{i:04}-{path.name}.png"
        image.paste(overlay, (0, 0), overlay)
        image.save(target)
        print(json.dumps({"path": str(path), "score": value, "threshold": threshold,
                          "anomalous": value > threshold, "overlay": str(target)}))
# ==== end shared


# ==== shared: command line and device
class UserError(Exception):
    """A mistake the user can mend. main() prints its one line and exits with code 2."""


class Parser(argparse.ArgumentParser):
    """argparse that reports a wrong flag in one line, like every other mistake."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help")


def read_command_line(argv: list[str] | None, config: type, description: str,
                      *parents: Parser) -> tuple[str, list[str], Config, dict]:
    """[train|eval|predict] [PATH ...] [--flag value ...] -> command, paths, settings, and the
    content of the checkpoint if one is read. Raises UserError for what will not do.

    The flags are the fields of `config`, each with its comment as help. What shapes the model or
    its numbers comes from the checkpoint where there is one.
    """
    parser = Parser(description=description, parents=parents, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="train", help="train, eval or predict")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="predict: images or folders")
    comments = dict(re.findall(r"^    (\w+): .*?#(.*\n(?: +#.*\n)*)", getsource(config), re.M))
    for f in fields(config):
        kind = {"type": {"int": int, "float": float}.get(f.type, str)}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=(
            re.sub(r"[\s#]+", " ", comments[f.name]).replace("%", "%%") +
            f"(default: {f.default})" * (str(f.default) not in ("", "False", "None"))),
            **{"action": "store_true"} if f.type == "bool" else kind)
    given = {"resume": False, "base": None} | vars(parser.parse_intermixed_args(argv))
    command, paths, resume, _ = (given.pop(k) for k in ("command", "paths", "resume", "base"))
    if command not in ("train", "eval", "predict") or bool(paths) != (command == "predict"):
        raise UserError(f"{command} {' '.join(paths)}: use train, eval, or predict with images")
    out = given.get("out", Config.out)
    path = given.pop("checkpoint", f"{out}/checkpoint.pt" * (resume or command != "train"))
    if not path:
        folders = [HERE / "data" / name for name in ("mvtec", "visa", "demo")]
        root = Path(given.get("data") or next(d for d in folders if d.is_dir())).resolve()
        preset = config.DEMO if root == folders[2].resolve() else (
            config.VISA if (root / "split_csv/1cls.csv").is_file() else {})
        print(f"data: {root}; data/README.md tells where to get others", file=sys.stderr)
        return command, [], config(**preset | given | {"out": out, "data": str(root)}), {}
    free = {"out", "device", "workers", "cache", *{  # a batch of another size: another training
        "train": "", "eval": "batch_size data", "predict": "batch_size threshold"}[command].split()}
    for name in given.keys() - free:
        raise UserError(f"--{name.replace('_', '-')}: comes from {path}; drop it")
    out = {"out": Config.out if command == "train" and not resume else str(Path(path).parent)}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return command, paths, config(**content["config"] | out | given), content
    except Exception as e:  # no such file, no checkpoint, a malicious one, another script's, ...
        raise UserError(f"--checkpoint {path}: {str(e)[:100]}; name one that this script (and "
                        "--base) wrote, or train first")


def choose_device(name: str) -> torch.device:
    """Turn --device into a torch device, under torchrun each process into its own. Raises UserError
    if this machine does not have it."""
    name = {"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(name, name)
    if name not in ("cpu", "cuda", "mps") or not torch.get_device_module(name).is_available():
        raise UserError(f"--device {name}: not on this machine; use --device auto")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        torch.backends.cudnn.deterministic = True  # convolutions repeat; not all else does
    return torch.device(name)


def autocast(x: Tensor, dtype: torch.dtype) -> torch.autocast:
    """Half precision on GPUs that have it, float32 elsewhere: not every CPU does, and a V100 has no
    bfloat16 of its own (False: an emulated one does not count). [ours] D18"""
    able = dtype == torch.float16 or x.is_cuda and torch.cuda.is_bf16_supported(False)
    return torch.autocast("cuda", dtype, enabled=x.is_cuda and able)
# ==== end shared


# ---- the script ----------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 after a mistake of the user's, told in one line, 130
    after Ctrl-C."""
    try:
        # The module whose detector CADA aligns, this or cnc.py, decides what other flags there are.
        parser, base = Parser(add_help=False, allow_abbrev=False), sys.modules[__name__]
        parser.add_argument("--base", choices=("revdist", "cnc"), default="revdist",
                            help="the detector; with cnc, the other flags are those of cnc.py")
        if parser.parse_known_args(argv)[0].base == "cnc":
            import cnc as base
            base.UserError = UserError  # a mistake is a mistake wherever it was noticed
        command, paths, cfg, content = read_command_line(argv, base.Config, __doc__, parser)
        if command != "train" and "cada" not in content:
            raise UserError("no CADA in the checkpoint: --resume its training, or add it to a CNC")
        normal, test = ([], []) if paths else read_dataset(Path(cfg.data))
        detector = base.build(cfg, content)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        if command == "train":
            content = train(base.train_detector, detector, normal, content)
        if paths:
            write_predictions(cfg, content, paths, partial(score, detector, content))
        elif content and test:  # {} in all but the first process of torchrun
            found = report(cfg, content, test, score(detector, content, test), {})
            plot_scores(cfg.out, test, content["thresholds"], *found)
        elif content:
            print(f"no test images, so nothing to evaluate; thresholds {content['thresholds']}")
        return 0
    except (UserError, OSError, KeyboardInterrupt) as e:
        told = str(e) or "interrupted; --resume goes on from the last checkpoint, if there is one"
        print(f"cada.py: error: {' '.join(told.split())}", file=sys.stderr)
        return 130 if isinstance(e, KeyboardInterrupt) else 2


if __name__ == "__main__":
    sys.exit(main())
