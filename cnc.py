r"""CNC: language keeps the decoder from reproducing defects (AAAI 2025, arXiv:2501.00346).

Wang, Wang, Bai, Lim, Xiao. CNC: Cross-modal Normality Constraint for Unsupervised Multi-class
Anomaly Detection, 2025. This is a reconstruction from public facts, and every choice says where it
comes from: [paper] is stated there, [port] was seen only in a third-party port, which proves
nothing, [author] in public code of CADA's first author (in shared sections), [ours] is a reading of
ours. D1, D2, ... number these in the README's list of departures.

The idea. A frozen CLIP describes the image, and a decoder that has seen normal images only must
reproduce the description; where it fails, the image is anomalous. But many classes teach the
decoder so many kinds of patches that it reproduces anomalies too ("over-generalisation"). CNC
guides the decoded features towards learnable prompts that mean "normal", whatever the class. And it
sends each patch through 2 of 5 experts, so that patches of different kinds disturb each other less.

How text helps. CLIP has a joint space, in which images and texts can be compared. There t_n is the
vector of the normal prompt and t_a that of the abnormal one; the margin of a patch says how much
nearer it is to t_n than to t_a, and psi in 0..1 how normal that is. The constraint moves decoded
patches towards t_n. The promotion adds psi (t_n - t_a) to a patch and to its decoded version. Where
psi is large, both gain the same direction, so that what the decoder gets wrong about texture counts
for less; where it is small, they keep their full distance. A text that means nothing does this at
random, which costs a little.

    image (B, 3, S, S)               "[V1]..[V4] object." "[V1]..[V4] damaged object." per tap
      |                                                     |
    Teacher, frozen CLIP image tower             PromptLearner, frozen CLIP text tower
      |                                                     |
    e1, e2, e3 (B, 1+N, C), from 3 blocks        t_n, t_a (taps, 2, D), unit vectors
      |                                                     |
    Student: fuse -> (B, 1+N, C)                            |
      |      GatedMoE, 2 of 5 experts a token               |
      |      decode -> d1, d2, d3 (B, 1+N, C)               |
      |                                                     |
    P(e), P(d): CLIP's joint space (B, N, D) <--- constraint: decoded patches at least as normal
      |                                      |    to the text as the average normal patch
      |                                      <--- promotion: v* = v + psi(e) (t_n - t_a), v = e, d
    M = mean over taps of 1 - cos(e*, d*) -> (B, S, S) -> blur -> image score (B,)

From paper to code ("tap": a block of the teacher whose output is read):

    frozen CLIP [paper], tapped at thirds [port]   Teacher
    class-agnostic learnable prompts [paper]       PromptLearner; their words: [ours] D16
    gated mixture-of-experts [paper]               GatedMoE
    fusion of the taps, decoder [port]             Student
    feature-level normality promotion [paper]      promote; its form: [ours] D13
    cross-modal normality constraint [paper]       CNC.constraint; its form: [ours] D10
    theta = 5, tau = 0.001 [paper]                 CNC.forward: warm-up epochs, and temperature of
                                                   the constraint; these roles: [ours] D9, D10
    distillation by cosine [paper]                 CNC.distance; by patches: [ours] D12
    joint space of image and text                  Teacher.joint; for all taps: [ours] D11
    anomaly map M [paper]                          CNC.describe, image_score; details: [ours] D15

Read it from the top. The method comes first, in the order in which an image passes through it;
then come training and evaluation, and after them what every such script needs. Sections between
`shared` banners stand in cada.py letter for letter.

    python cnc.py                                      train and evaluate; without data/mvtec and
                                                       data/visa on the small set in data/demo
    python cnc.py --data DIR                           on MVTec AD, VisA, or a tree of your own
    python cnc.py --no-moe --no-fnp --no-constraint    reverse distillation without CNC's parts
    python cnc.py eval --checkpoint FILE               the same numbers again
    python cnc.py predict PATH ... --checkpoint FILE   score images, write heat maps
    torchrun --nproc-per-node=N cnc.py ...             train on N GPUs
    python cada.py --base cnc                          one threshold for all classes (cada.py)
"""
from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import ExifTags, Image, ImageOps
from scipy import ndimage
from sklearn.model_selection import train_test_split
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, ConvertImageDtype, PILToTensor
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
    """Train and evaluate CNC, evaluate a checkpoint again, or score images with it.

    The defaults are the published settings for MVTec AD [paper], where there are any; VisA differs
    in one. On data/demo a tiny teacher and fewer epochs replace them. With a checkpoint, its
    settings are the defaults instead.
    """

    # train (and evaluate), evaluate a checkpoint, or predict: score images of unknown label
    command: Positional[Literal["train", "eval", "predict"]] = "train"
    paths: Positional[tuple[str, ...]] = ()  # for predict: images, or folders of images
    data: str = ""  # data set folder; if not given: data/mvtec, else data/visa, else data/demo
    out: str = "runs/cnc"  # folder for everything that is written
    seed: int = 0  # it decides the weights, the batches, the images held out and the dropout
    # auto: a GPU of NVIDIA's if there is one, else the CPU; mps: Apple's GPU
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    # frozen CLIP: a ViT of open_clip's [paper], or tiny, a small one built here [ours] D3.
    # OpenAI's weights want a name that ends in -quickgelu
    teacher: str = "ViT-L-14-336-quickgelu"
    weights: str = "openai"  # of the teacher [paper]: open_clip tag, file, or none: random
    # sides in pixels of the square that images are squashed to, a multiple of the teacher's patch;
    # 0: what it was made for, 336 [paper]
    image_size: int = 0
    # blocks of the teacher to reproduce, for instance 8 16 24; if not given: those at one third,
    # two thirds and all of its depth [port]
    taps: tuple[int, ...] = ()
    batch_size: int = 8  # images a training step [paper], of all processes of torchrun together
    epochs: int = 250  # passes over the training images [paper]; 200 on VisA (raw archive)
    lr: float = 1e-3  # Adam learning rate [paper]
    experts: int = 5  # experts of the gated mixture [paper]
    top_k: int = 2  # experts that each token uses [paper]
    # epochs in which the constraint teaches the prompts and not yet the decoder [paper], meaning
    # [ours] D9; the distillation runs from the start
    theta: int = 5
    tau: float = 0.001  # temperature of the constraint [paper], role [ours] D10
    moe: bool = True  # gated mixture of experts; --no-moe: one expert for all tokens
    fnp: bool = True  # feature-level normality promotion
    # guide the decoded features towards normal text; in the warm-up the prompts learn by the same
    # loss, and with --no-constraint they still do if the promotion needs them
    constraint: bool = True
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
        if self.batch_size < 1:
            raise UserError("--batch-size: give at least 1")
        if self.epochs < 1:
            raise UserError("--epochs: give at least 1")
        if not 1 <= self.top_k <= self.experts:
            raise UserError("--top-k: give 1 to --experts")
        if not self.tau > 0:
            raise UserError("--tau: give a temperature above 0")
        if not 0 <= self.holdout <= 0.9:
            raise UserError("--holdout: give a share from 0 to 0.9")


# On the demo set two CPU cores are enough. [ours] D3
DEMO = {"teacher": "tiny", "weights": "none", "epochs": 30, "workers": 0}
VISA = {"epochs": 200}  # [paper]


# ---- frozen teacher: CLIP ------------------------------------------------------------------------
# CLIP has learned from captions, so that an image and a text which fit each other lie close
# together. Its image tower is what the student must reproduce; its text tower is the judge of what
# is normal.

class Teacher(nn.Module):
    """CLIP, both towers: no gradients into its weights, always in eval mode. [paper]

    forward: (B, 3, S, S) -> for each tap (B, 1 + N, C) float16: the CLS token, which stands for the
    whole image, then the patches row by row. Blocks after the last tap are not run. The tokens are
    in half precision whether they are cached or not, so that --no-cache changes the time and, but
    for rounding, nothing else. [ours] D2
    Raises UserError for impossible taps or sizes, and for weights that cannot be had or do not fit.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.random = cfg.weights == "none"
        # The teacher of a seed is the same whatever was drawn before it, and nothing that is drawn
        # after it, the student's weights above all, depends on the teacher.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.clip, self.tokenizer = load_clip(cfg.teacher, cfg.weights, cfg.image_size)
        visual = self.clip.visual
        patch = visual.patch_size[0]
        self.size = visual.image_size[0]
        self.grid = self.size // patch
        self.width = visual.class_embedding.shape[0]
        if self.size % patch:
            raise UserError(f"--image-size: {cfg.teacher} takes multiples of {patch}")

        depth = len(visual.transformer.resblocks)
        self.taps = list(cfg.taps) or [round(depth * third / 3) for third in (1, 2, 3)]
        rising = self.taps == sorted(set(self.taps))
        if not rising or self.taps[0] < 1 or self.taps[-1] > depth:
            raise UserError(f"--taps: give rising numbers of blocks, 1 to {depth}")

        self.hash = None if self.random else weights_hash(self)
        if self.random:
            self.register_buffer("mean", torch.zeros(len(self.taps), 1, self.width))
            self.register_buffer("whiten", torch.eye(self.width).repeat(len(self.taps), 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> nn.Module:
        """Stay in eval mode whatever the parent does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Tensor]:
        # open_clip's own way to intermediate blocks; it counts them from 0, and stops at the last.
        blocks = [tap - 1 for tap in self.taps]
        with autocast(x, torch.float16):
            found = self.clip.visual.forward_intermediates(
                x, indices=blocks, stop_early=True, intermediates_only=True,
                output_fmt="NLC", output_extra_tokens=True)
        tokens = []
        for i in range(len(self.taps)):
            cls = found["image_intermediates_prefix"][i]  # (B, 1, C)
            patches = found["image_intermediates"][i]  # (B, N, C)
            t = torch.cat([cls, patches], dim=1)
            if self.random:  # its tokens differ in length from block to block and from CLS to patch
                t = (F.layer_norm(t.float(), (self.width,)) - self.mean[i]) @ self.whiten[i]
            tokens.append(t.half())
        return tokens

    def estimate_statistics(self, batches: Iterable) -> None:
        """Give a random teacher the mean and covariance of the training images' tokens, tap by tap:
        from now on it answers with whitened ones. [ours] D3

        A random network says little more than the mean colour of a patch: that one direction drowns
        all others in a cosine, and a decoder has learned it in no time. Whitening brings texture up
        to the same size. The tokens of a trained CLIP are left as they are.
        """
        # Sums over all tokens, in float64, because a difference of two large ones follows.
        count = 0
        total = torch.zeros(self.mean.shape, dtype=torch.float64)
        products = torch.zeros(self.whiten.shape, dtype=torch.float64)
        for x in batches:
            tokens = torch.stack(self(x)).flatten(1, 2).cpu().double()  # (taps, B * (1 + N), C)
            count += tokens.shape[1]
            total += tokens.sum(1, keepdim=True)
            products += tokens.mT @ tokens

        mean = total / count  # (taps, 1, C)
        covariance = products / count - mean.mT @ mean  # (taps, C, C), of each tap = V L V^T
        self.mean.copy_(mean)
        # The whitening matrix of a tap is W = V (L / l_max + 1/1000)^(-1/2) V^T. Directions with
        # less than a thousandth of the largest variance count as noise, which stays small.
        for tap in range(len(self.taps)):
            values, vectors = torch.linalg.eigh(covariance[tap])  # (C,), rising, and (C, C)
            scale = (values / values[-1] + 1e-3).rsqrt()
            self.whiten[tap] = (vectors * scale) @ vectors.T

    def unwhitened(self, features: list[Tensor]) -> list[Tensor]:
        """Undo the whitening: [(B, 1 + N, C)] -> the same, layer-normalised, less a mean that is
        the same for all.

        Whitening brings out what tells patches apart, at the cost of what tells classes apart, and
        CADA wants to know classes. [ours] D17
        """
        if not self.random:
            return features
        return [features[i] @ torch.linalg.inv(self.whiten[i]) for i in range(len(features))]

    def joint(self, tokens: Tensor) -> Tensor:
        """P(f): tokens of any tap (..., C) -> unit vectors in the space shared with text (..., D).

        CLIP's own frozen head, though it was made for the CLS token of the last block [ours] D11. A
        learned head under a cosine loss may collapse: to map all to one vector makes it zero.
        """
        return F.normalize(self.clip.visual.ln_post(tokens) @ self.clip.visual.proj, dim=-1)


# A CLIP that needs no download: random weights from a seed, small enough for a CPU. [ours] D3
TINY_VISION = {"image_size": 128, "patch_size": 16, "width": 192, "layers": 6}
TINY_TEXT = {"context_length": 32, "width": 128, "heads": 2, "layers": 3}


def tiny_clip(size: int) -> open_clip.CLIP:
    """The small CLIP for images of size x size pixels, 0: 128 x 128."""
    vision = TINY_VISION | {"image_size": size or TINY_VISION["image_size"]}
    clip = open_clip.CLIP(embed_dim=192, vision_cfg=vision, text_cfg=TINY_TEXT)
    clip.visual.positional_embedding.data *= 0.3  # as it is drawn, it outweighs texture
    nn.init.orthogonal_(clip.visual.proj)  # as good as a rotation: the joint space keeps cosines
    return clip


def load_clip(name: str, weights: str, size: int) -> tuple[open_clip.CLIP, Callable]:
    """A CLIP and its tokenizer: tiny, or open_clip's of that name.

    Raises UserError for weights that cannot be had or do not fit, and for a CLIP that is not a
    plain ViT with a CLS token and a text tower of CLIP's kind.
    """
    logging.disable(logging.CRITICAL)  # open_clip logs what we report ourselves
    # Weights that were trained with QuickGELU, x * sigmoid(1.702 x), as OpenAI's were, would run
    # with plain GELU and be a little wrong in every block. open_clip warns; we stop.
    warnings.filterwarnings("error", "QuickGELU mismatch")
    try:
        if name == "tiny":
            clip = tiny_clip(size)
            if weights != "none":
                open_clip.load_checkpoint(clip, weights)
            tokenizer = open_clip.SimpleTokenizer(context_length=TINY_TEXT["context_length"])
        else:
            # open_clip knows itself whether these weights are a tag or a file.
            pretrained = None if weights == "none" else weights
            clip = open_clip.create_model(name, pretrained, force_image_size=size or None,
                                          pretrained_text=False)
            tokenizer = open_clip.get_tokenizer(name)
        plain_text = isinstance(tokenizer, open_clip.SimpleTokenizer)
        plain_image = getattr(clip.visual, "pool_type", "") == "tok"
        if not (isinstance(clip, open_clip.CLIP) and plain_text and plain_image):
            raise ValueError("not a plain ViT with a CLS token and a text tower of CLIP's kind")
        return clip, tokenizer
    except Exception as e:  # a failed download, a broken file, an unknown name: many kinds
        raise UserError(f"--teacher {name} --weights {weights}: {str(e)[:200]}; give tiny or a ViT "
                        "of open_clip's, as ViT-B-16-quickgelu, and a tag or file of its weights, "
                        "or none")
    finally:
        logging.disable(logging.NOTSET)


# ---- class-agnostic prompts ----------------------------------------------------------------------
# A prompt is a sentence whose first words are not words but vectors that can be learned. They are
# the only thing about text that learns here.

class PromptLearner(nn.Module):
    """Two learnable sentences for each tap, the same for all classes: no class name enters.
    [paper] Their form is [ours] D16, after the template of AnomalyCLIP:

        normal    [V1] [V2] [V3] [V4] object.
        abnormal  [V1] [V2] [V3] [V4] damaged object.

    `ctx` (taps, 4, dim) holds the V, vectors in the place of word embeddings, which start as "a
    photo of a". Nothing but the word "damaged" tells the two sentences apart: a one-class loss lets
    two free contexts drift to where their difference says nothing about defects.

    forward: a CLIP -> (taps, 2, D), unit vectors t_n and t_a for each tap. `start` is what they
    were before any learning.
    """

    # "a object", since both sentences share their context.
    SENTENCES = ("a photo of a object.", "a photo of a damaged object.")
    N_CTX = 4  # "a photo of a": a token each

    def __init__(self, clip: open_clip.CLIP, tokenizer: Callable, taps: int) -> None:
        super().__init__()
        ids = tokenizer(self.SENTENCES)  # (2, length): start, context, sentence, end, padding
        words = clip.token_embedding(ids).detach()  # (2, length, dim)
        # Both follow from the teacher, so no checkpoint needs to store them.
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("words", words, persistent=False)
        self.ctx = nn.Parameter(words[0, 1:1 + self.N_CTX].repeat(taps, 1, 1))
        start = encode_prompts(clip, words, ids).detach()  # (2, D)
        self.register_buffer("start", start.repeat(taps, 1, 1))

    def forward(self, clip: open_clip.CLIP) -> Tensor:
        taps = len(self.ctx)
        words = self.words.repeat(taps, 1, 1, 1)  # a copy, (taps, 2, length, dim)
        words[:, :, 1:1 + self.N_CTX] = self.ctx[:, None]
        text = encode_prompts(clip, words.flatten(0, 1), self.ids.repeat(taps, 1))
        return text.unflatten(0, (taps, 2))


def encode_prompts(clip: open_clip.CLIP, words: Tensor, ids: Tensor) -> Tensor:
    """CLIP's frozen text tower, from its word embeddings on: words (n, length, dim), and their
    tokens ids (n, length) -> unit vectors (n, D)."""
    x = clip.transformer(words + clip.positional_embedding, attn_mask=clip.attn_mask)
    x = clip.ln_final(x)  # (n, length, dim)
    # The mask lets a token read those before it, so only the end token has read the sentence. It
    # has the largest number.
    end = ids.argmax(dim=-1)
    text = x[torch.arange(len(x)), end] @ clip.text_projection
    return F.normalize(text.float(), dim=-1)


# ---- student: fusion, mixture of experts, decoder ------------------------------------------------
# Three taps come in, one mixed token a patch goes through the bottleneck, three taps come out
# again. The experts stand in the bottleneck, where patches of all kinds have to share the room.

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
        # A linear gate, one score an expert. [port]
        self.gate = nn.Linear(dim, num_experts)
        self.top_k = top_k
        self.experts = nn.ModuleList(expert(dim) for _ in range(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # For the mixture a token is a token, of whatever image: (B, N, dim) -> (T, dim), T = B * N
        tokens = x.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):  # bf16 would change some choices
            scores = self.gate(tokens.float())  # (T, experts)
        top, chosen = scores.topk(self.top_k, dim=-1)  # (T, top_k) each
        weights = top.softmax(-1)  # they add up to 1 over the chosen ones

        y = torch.zeros_like(tokens, dtype=torch.float32)
        for k, expert_k in enumerate(self.experts):
            # (m,) and (m,): the m tokens that chose this expert, and as which of their choices
            token, choice = (chosen == k).nonzero(as_tuple=True)
            answer = expert_k(tokens[token]).float()  # (m, dim): it sees no other tokens
            y = y.index_add(0, token, weights[token, choice, None] * answer)

        # (std / mean)^2 of the experts' summed probabilities: 0 when all are equally probable.
        # Without it the gate may settle on two experts that get all tokens and gradients. The port
        # has it too, but commented out. [port]
        load = scores.softmax(-1).sum(0)
        balance = load.var(correction=0) / load.mean() ** 2
        return y.view(x.shape), balance


class Student(nn.Module):
    """What CNC trains besides the prompts: fusion, experts, decoder.

    forward: the teacher's taps [(B, 1 + N, C), ...], float32 -> the same shapes, reproduced, and
    the balance loss. Fusion with dropout 0.1, and a decoder of one transformer block a tap. It runs
    from deep to shallow: its first block reproduces the last tap. [port]
    """

    def __init__(self, taps: int, dim: int, experts: int, top_k: int) -> None:
        """experts = 0: one expert of the same width for all tokens, and no gate."""
        super().__init__()
        self.fuse = nn.Sequential(nn.Linear(taps * dim, dim), nn.LayerNorm(dim), nn.Dropout(0.1))
        self.moe = GatedMoE(dim, experts, top_k) if experts else expert(dim)
        # Pre-norm, and heads of 64 channels as in CLIP's own blocks.
        self.blocks = nn.ModuleList()
        for _ in range(taps):
            self.blocks.append(nn.TransformerEncoderLayer(
                dim, nhead=max(1, dim // 64), dim_feedforward=4 * dim, dropout=0.0,
                activation="gelu", batch_first=True, norm_first=True))

    def forward(self, features: list[Tensor]) -> tuple[list, Tensor]:
        x = self.fuse(torch.cat(features, dim=-1))  # (B, 1 + N, C)
        if isinstance(self.moe, GatedMoE):
            x, balance = self.moe(x)
        else:
            x = self.moe(x).float()  # float32 like the mixture's: --no-moe changes nothing else
            balance = x.new_zeros(())
        decoded = []
        for block in self.blocks:
            x = block(x)
            decoded.insert(0, x)  # the block that runs last reproduces the first tap
        return decoded, balance


# ---- CNC -----------------------------------------------------------------------------------------
# Teacher, prompts and student together: what text adds to reverse distillation. First the two small
# formulas, promotion and margin, then the statistics that give a margin its scale, then the loss.

def margin(v: Tensor, text: Tensor) -> Tensor:
    """<v, t_n - t_a>: how much nearer unit vectors v (taps, B, N, D) are to the normal text than to
    the abnormal one, of text (taps, 2, D). Returns (taps, B, N)."""
    direction = text[:, 0] - text[:, 1]  # (taps, D)
    return (v * direction[:, None, None]).sum(-1)


def promote(v: Tensor, psi: Tensor, text: Tensor) -> Tensor:
    """Feature-level normality promotion: v* = v + psi (t_n - t_a).

    v: unit vectors (taps, B, N, D), psi (taps, B, N) in 0..1, text (taps, 2, D). Returns
    (taps, B, N, D), not normalised, since the cosine that follows does that. Encoded and decoded
    patch gain the same, so the angle between them mostly shrinks, and shrinks the more the more
    normal the text finds the patch; one that it finds abnormal keeps its distance. That CNC has a
    promotion is [paper], its form [ours] D13.
    """
    direction = text[:, 0] - text[:, 1]  # (taps, D)
    return v + psi[..., None] * direction[:, None, None]


class NormalMargins(nn.Module):
    """Mean and standard deviation of the margins of encoded normal patches, tap by tap, (taps, 1,
    1) each, over all training steps so far. [ours] D10, D13

    What a margin of 0.05 means differs from tap to tap and from CLIP to CLIP; these two say it
    without any label. (With torchrun they are those of the first process's images.)
    """

    def __init__(self, taps: int) -> None:
        super().__init__()
        # Buffers and not parameters: they go into the checkpoint, but no gradient moves them.
        self.register_buffer("mean", torch.zeros(taps, 1, 1))
        self.register_buffer("std", torch.zeros(taps, 1, 1))
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def update(self, margins: Tensor) -> None:
        """Take in the margins (taps, B, N) of one training step."""
        std, mean = torch.std_mean(margins, dim=(1, 2), correction=0, keepdim=True)
        self.steps += 1
        self.mean.lerp_(mean, 1 / self.steps)  # a running average: m += (new - m) / steps
        self.std.lerp_(std, 1 / self.steps)


class CNC(nn.Module):
    """Reverse distillation with a cross-modal normality constraint.

    CADA and the shared code need this much of a detector: `preprocess` turns an image into a uint8
    tensor; `standardise` turns a batch of them, on the device, into the input of `teacher`, which
    gives frozen features; called on these, the detector gives the loss, and `describe` turns them
    into pooled features and a raw anomaly map.
    """

    BALANCE_WEIGHT = 0.01  # [ours] D14

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.teacher = Teacher(cfg)
        clip = self.teacher.clip
        taps = len(self.teacher.taps)
        stored = getattr(clip.visual, "preprocess_cfg", {})  # what the weights were trained with
        resize, _, _, normalise_colours = open_clip.image_transform(  # squashed [ours] D19
            self.teacher.size, is_train=False, mean=stored.get("mean"), std=stored.get("std"),
            interpolation=stored.get("interpolation"), resize_mode="squash").transforms
        self.preprocess = Compose([resize, PILToTensor()])
        self.standardise = Compose([ConvertImageDtype(torch.float32), normalise_colours])
        self.prompts = PromptLearner(clip, self.teacher.tokenizer, taps)
        self.margins = NormalMargins(taps)
        experts = cfg.experts if cfg.moe else 0
        self.student = Student(taps, self.teacher.width, experts, cfg.top_k)

    def decode(self, features: list[Tensor]) -> tuple[list, list, Tensor]:
        """Teacher features -> encoded and decoded tokens, float32, and the balance loss."""
        encoded = [f.float() for f in features]
        with autocast(features[0], torch.bfloat16):
            decoded, balance = self.student(encoded)
        return encoded, [d.float() for d in decoded], balance

    def text(self, learning: bool = False) -> Tensor:
        """t_n and t_a of each tap, (taps, 2, D), with a gradient only while the prompts learn."""
        with torch.set_grad_enabled(learning):
            return self.prompts(self.teacher.clip)

    def patches(self, tokens: list[Tensor]) -> Tensor:
        """Lists of (B, 1 + N, C) -> patches in the joint space, unit vectors (taps, B, N, D)."""
        return torch.stack([self.teacher.joint(t[:, 1:]) for t in tokens])

    def psi(self, e: Tensor, text: Tensor) -> Tensor:
        """The cross-modal control coefficient of encoded patches, (taps, B, N, D) -> (taps, B, N)
        in 0..1: a sigmoid of how many standard deviations the margin is above the average of normal
        patches. [ours] D13"""
        deviations = (margin(e, text) - self.margins.mean) / (self.margins.std + 1e-6)
        return deviations.sigmoid()

    def distance(self, e: Tensor, d: Tensor, text: Tensor) -> Tensor:
        """1 - cos(e*, d*) of each patch: (taps, B, N, D) -> (taps, B, N) in 0..2. RD with a cosine
        is [paper], patch by patch and in the joint space [ours] D12."""
        if self.cfg.fnp:
            psi = self.psi(e, text)  # of e for both: by training, d looks normal anyway
            e = promote(e, psi, text)
            d = promote(d, psi, text)
        return 1 - F.cosine_similarity(e, d, dim=-1)

    def constraint(self, v: Tensor, text: Tensor) -> Tensor:
        """The cross-modal normality constraint: the cross entropy of softmax(<v, [t_n, t_a]> / tau)
        against "normal", times tau; mean over patches v (taps, B, N, D). [paper] that there is one
        and the value of tau; its form is [ours] D10.

        Each cosine is taken less its mean over normal patches. Else the sign of the average margin
        would decide whether all patches have a gradient or none: at tau = 0.001 a gap of 0.01 is
        one of 10 between the logits. A softmax sees only the difference of its two logits, so the
        margin and 0 say the same.

        With two texts the cross entropy is log(1 + exp(-margin / tau)). At tau = 0.001 that is a
        hinge: 0 where the margin is above the average, and below it a line of slope 1 / tau. Times
        tau the slope is 1, like that of a cosine in the distillation.
        """
        centred = margin(v, text) - self.margins.mean  # (taps, B, N)
        logits = torch.stack([centred, torch.zeros_like(centred)], dim=-1) / self.cfg.tau
        normal = torch.zeros(centred.numel(), dtype=torch.long, device=v.device)  # the first text
        return self.cfg.tau * F.cross_entropy(logits.flatten(0, 2), normal)

    def forward(self, features: list[Tensor], warm_up: bool = False) -> Tensor:
        """The loss: L = L_distillation + L_constraint + 0.01 L_balance, a scalar; and in the
        warm-up, while the prompts learn, |text - start|^2. The weights are [ours] D10, D14, D16.

        In the warm-up the constraint reads *encoded* patches and teaches the prompts to find all
        normal patches alike, held back by their distance to the words that they started as. After
        it, it reads *decoded* patches [paper] and teaches the decoder; the prompts are fixed. That
        theta means this is [ours] D9.
        """
        encoded, decoded, balance = self.decode(features)
        e = self.patches(encoded)
        d = self.patches(decoded)
        learning = warm_up and self.uses_text()
        text = self.text(learning)
        self.margins.update(margin(e, text))

        # Distillation. It must not teach the prompts: they could learn to hide errors.
        loss = self.distance(e, d, text.detach()).mean() + self.BALANCE_WEIGHT * balance
        # Warm-up: the prompts learn from what the teacher says of normal patches. Their distance to
        # where they started keeps "damaged" damaged.
        if learning:
            drift = (text - self.prompts.start).square().sum((1, 2)).mean()
            loss = loss + self.constraint(e, text) + drift
        # After it: the decoder learns, since the text has no gradient.
        elif self.cfg.constraint and not warm_up:
            loss = loss + self.constraint(d, text)
        return loss

    def uses_text(self) -> bool:
        """Whether anything reads the prompts, so that they should learn in the warm-up."""
        return self.cfg.fnp or self.cfg.constraint

    def describe(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Teacher features -> (pooled (B, 2 * taps * C), raw anomaly map (B, S, S) in 0..2).

        M = mean over taps of 1 - cos(e*, d*) of each patch, up-sampled [paper]. A token's value
        belongs to the centre of its patch, hence no align_corners [ours] D15. The pooled features,
        mean and standard deviation over patches, are for CADA: frozen features of the whole image
        tell its class. [ours] D6
        """
        encoded, decoded, _ = self.decode(features)
        e = self.patches(encoded)  # (taps, B, N, D)
        d = self.patches(decoded)
        m = self.distance(e, d, self.text()).mean(0)  # over taps: (B, N)
        maps = self.upsample(m, "bilinear")

        pooled = []
        for tokens in self.teacher.unwhitened(encoded):
            std, mean = torch.std_mean(tokens[:, 1:], dim=1)  # (B, C) each
            pooled += [mean, std]
        return torch.cat(pooled, dim=1), maps

    def explain(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What the report shows: what the text alone says of each patch, 1 - psi in 0..1, (B, N);
        and the anomaly map, smoothed (B, S, S)."""
        _, maps = self.describe(features)
        e = self.patches([f.float() for f in features])
        psi = self.psi(e, self.text())  # (taps, B, N)
        return 1 - psi.mean(0), smooth(maps)

    def upsample(self, values: Tensor, mode: str) -> Tensor:
        """One value a patch (B, N) -> one a pixel (B, S, S)."""
        grid = values.view(-1, 1, self.teacher.grid, self.teacher.grid)
        return F.interpolate(grid, (self.teacher.size, self.teacher.size), mode=mode)[:, 0]


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
# One loop runs two phases: first the prompts learn, then the decoder under their guidance. With
# torchrun several processes train together, each on its share of the images.

# torchrun says which of its processes this is, and of how many.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def build(cfg: Config, checkpoint: dict | None) -> CNC:
    """The detector on its device, with the weights of a checkpoint if there is one."""
    torch.manual_seed(cfg.seed)  # for the student's weights; the teacher draws apart
    detector = CNC(cfg)
    if checkpoint:
        load_weights(detector, checkpoint)
    if detector.teacher.random:
        print("teacher: RANDOM weights, so that text means nothing to it; the numbers are not the "
              "paper's", file=sys.stderr)
    return detector.to(choose_device(cfg.device))


def train_detector(detector: CNC, samples: list[Sample], checkpoint: dict | None) -> dict:
    """Train on normal images, from where the checkpoint stopped if there is one. Returns the new
    checkpoint. Raises UserError for a loss that is no number.

    Prompts, fusion, experts and decoder learn; the teacher's features are computed without
    gradients. In the first theta epochs the constraint teaches the prompts, afterwards the decoder.
    There is no validation and no best epoch, which only test images could choose: the last step
    counts.
    """
    cfg = detector.cfg
    steps_an_epoch = len(samples) / cfg.batch_size
    steps = max(1, round(cfg.epochs * steps_an_epoch))
    warm_up_steps = cfg.theta * steps_an_epoch
    step = checkpoint["step"] if checkpoint else 0
    if step >= steps:
        print(f"trained already: {step} steps", file=sys.stderr)
        return checkpoint
    if cfg.batch_size % WORLD_SIZE:
        raise UserError(f"--batch-size: give a multiple of the {WORLD_SIZE} processes")
    # A random teacher sees all images in every process, or each would have another teacher.
    if detector.teacher.random and step == 0:
        detector.teacher.estimate_statistics(image_batches(detector, samples))

    parameters = [*detector.student.parameters(), *detector.prompts.parameters()]
    optimizer = torch.optim.Adam(parameters, cfg.lr, fused=True)  # Adam: [paper]; fused: faster
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["lr"] = cfg.lr  # a flag goes before what the checkpoint says
    engine = detector
    if WORLD_SIZE > 1:
        distributed.init_process_group()

    share = samples[RANK::WORLD_SIZE]  # the images of this process
    batches = shuffled(len(share), cfg.batch_size // WORLD_SIZE, steps, cfg.seed)
    features = teacher_features(detector, share, batches[step:])
    detector.train()
    phase = None
    bar = tqdm(features, "training", steps, initial=step, disable=None)
    for encoded in bar:
        warm_up = step < warm_up_steps
        if warm_up != phase:  # at the first step, and at the end of the warm-up
            phase = warm_up
            detector.prompts.requires_grad_(warm_up and detector.uses_text())
            # The gradient is the mean over all processes. Which parameters have one is settled when
            # the wrapper is made.
            if WORLD_SIZE > 1:
                engine = nn.parallel.DistributedDataParallel(detector)

        torch.manual_seed(hash((cfg.seed, RANK, step)))  # dropout, the same in a resumed run
        loss = engine(encoded, warm_up=warm_up)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1

        # Ten checkpoints in all, and a look at the loss before each.
        due = step % max(1, steps // 10) == 0 or step == steps
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


# ---- evaluation ----------------------------------------------------------------------------------
# Besides CNC's map the report shows what the text alone would say.

def explain_all(detector: CNC, samples: list[Sample]) -> dict:
    """Two variants of anomaly maps of images, each a function that returns them (N, S, S): "text",
    what the text alone says; "cnc", smoothed."""
    text, maps = run_on_images(detector, samples, detector.explain)
    return {"text": lambda: detector.upsample(text, "nearest"), "cnc": lambda: maps}


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

def run(argv: list[str] | None) -> None:
    """Load, train, evaluate."""
    cfg, checkpoint = read_command_line(argv, Config(), DEMO, VISA)
    if cfg.command != "train" and "cnc" not in checkpoint.get("thresholds", {}):
        raise UserError("no threshold of cnc.py in the checkpoint: --resume its training")
    training = cfg.command == "train"
    normal, test = [], []
    if cfg.command != "predict":
        normal, test = read_dataset(Path(cfg.data), training)
    detector = build(cfg, checkpoint)
    if RANK == 0:
        prepare_out(cfg)

    if training:
        kept, held = hold_out(cfg, normal)
        checkpoint = train_detector(detector, kept, checkpoint)
    if RANK > 0:  # of torchrun's processes only the first evaluates and writes
        return
    if training:
        def score(features: list[Tensor]) -> list[Tensor]:
            return [image_score(smooth(detector.describe(features)[1]))]

        scores = run_on_images(detector, held, score)[0]
        checkpoint["thresholds"] = {"cnc": conformal_threshold(scores)}
        save_checkpoint(detector, checkpoint)

    thresholds = checkpoint["thresholds"]
    if cfg.command == "predict":
        write_predictions(cfg, thresholds["cnc"],
                          lambda samples: explain_all(detector, samples)["cnc"]())
    elif test:
        scales = {"cnc": 2 * thresholds["cnc"], "text": 1}
        report(cfg, test, explain_all(detector, test), thresholds, "cnc", scales)
    else:
        print(f"no test images, so nothing to evaluate; threshold {thresholds['cnc']:.4f}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0 on success, 2 after a mistake of the user's, told in one
    line, and 130 after Ctrl-C."""
    try:
        run(argv)
        return 0
    except (UserError, OSError) as e:
        # Of a mistake that a loader's worker found, the end of its traceback.
        message = str(e).rsplit("UserError: ", 1)[-1]
        print("cnc.py: error:", " ".join(message.split()), file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("cnc.py: error: the GPU's memory is full; lower --batch-size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cnc.py: error: interrupted; --resume goes on from the last checkpoint, if any",
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for names that the console cannot print
    sys.exit(main())
