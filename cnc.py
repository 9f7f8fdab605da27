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

What the text does. Say the text finds an encoded patch abnormal: psi is near 0, the patch gets no
promotion and keeps its full distance to the decoded one, which the constraint has moved towards
"normal", away from it. Normal patches have a psi around 1/2, most 0.2 to 0.8: both sides gain the
same normal direction, so that what the decoder gets wrong about texture counts for less. Text that
means nothing does this at random, which costs a little.

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
    P(e), P(d): CLIP's joint space (B, N, D) <--- constrain: decoded patches at least as normal
      |                                      |    to the text as the average normal patch
      |                                      <--- promote: v* = v + psi(e) (t_n - t_a), v = e and d
    M = mean over taps of 1 - cos(e*, d*) -> (B, S, S) -> blur -> image score (B,)

paper                                          here
  frozen CLIP [paper], tapped at thirds [port]   Teacher
  class-agnostic learnable prompts [paper]       PromptLearner
  gated mixture-of-experts [paper]               GatedMoE
  fusion, decoder [port]                         Student
  feature-level normality promotion [paper]      promote; its form: [ours] D13
  cross-modal normality constraint [paper]       CNC.constraint; form: [ours] D10
  theta = 5 [paper]                              CNC.forward; warm-up: [ours] D9
  tau = 0.001 [paper]                            CNC.constraint; its role: [ours] D10
  distillation by cosine [paper]                 CNC.distance; patch by patch: [ours] D12
  joint space                                    Teacher.joint; frozen, all taps: [ours] D11
  anomaly map M [paper]                          CNC.describe; image_score: [ours] D15

Read it from the top: the method comes first, in the order in which an image passes through it,
then training and evaluation. What stands between `shared` banners is in cada.py letter for letter.

    python cnc.py                                      train and evaluate; without data/mvtec and
                                                       data/visa on the small set in data/demo
    python cnc.py --data DIR                           on MVTec AD, VisA, or a tree of your own
    python cnc.py --no-moe --no-fnp --no-constraint    plain reverse distillation, in joint space
    python cnc.py eval --checkpoint FILE               the same numbers again
    python cnc.py predict --checkpoint FILE PATH ...   score images, write heat maps
    torchrun --nproc-per-node=N cnc.py ...             train on N GPUs
    python cada.py --base cnc                          one threshold for all classes (cada.py)

Measured on the demo set: tiny random CLIP, about a minute a run on 2 CPU cores, seeds 0-2, in %,
class-mean I-AUROC / P-AUROC: 90.1 +- 0.4 / 93.5 +- 0.9, plain reverse distillation 89.4 +- 1.3 /
93.8 +- 0.4; pooled I-AUROC 86.5 +- 1.5 against 82.5 +- 5.1. A random teacher's text means nothing;
made to mean "damaged" it gains: 93.9 / 96.8 where no text has 90.1 / 93.9. This proves the
machinery, not the paper's gain. MVTec AD, VisA, trained CLIP weights and a GPU: not run here. ELPV
and all that was tried: data/RESULTS.md.
"""
from __future__ import annotations

import argparse
import csv
import json
import logging
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
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy import ndimage
from torch import Tensor, distributed, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
RANK, COUNT = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun's


# ---- settings ------------------------------------------------------------------------------------
@dataclass
class Config:
    """Every setting is a flag, and the comment beside it is what --help says.

    The defaults are the published settings for MVTec AD [paper] where there are any; VisA differs
    in one.
    """

    # What replaces the defaults on the demo set, so that two CPU cores do it in minutes. [ours] D3
    DEMO = {"teacher": "tiny", "weights": "none", "epochs": 30, "workers": 0}
    VISA = {"epochs": 200}  # [paper]

    data: str = ""  # data set folder; default: data/mvtec, else data/visa, else data/demo
    out: str = "runs/cnc"  # folder for everything that is written
    seed: int = 0  # of weights, batches, hold-out and dropout
    device: str = "auto"  # where to run: cpu, cuda, mps, or auto: a GPU of NVIDIA's, else the CPU
    teacher: str = "ViT-L-14-336"  # frozen CLIP: an open_clip ViT [paper], or tiny, a small one
    #                                built here [ours] D3
    weights: str = "openai"  # its weights: open_clip tag, local file, or none (random) [paper]
    image_size: int = 0  # sides of the square that images are squashed to, in pixels, a multiple of
    #                      the teacher's patch; 0: what it was made for, 336 [paper]
    taps: str = ""  # blocks of the teacher to reproduce, for instance 8,16,24; default: at one
    #                 third, two thirds and all of its depth [port]
    batch_size: int = 8  # images a training step [paper], of torchrun's processes together
    epochs: int = 250  # passes over the training images [paper]; 200 on VisA (raw archive)
    lr: float = 1e-3  # Adam learning rate [paper]
    experts: int = 5  # experts of the gated mixture [paper]
    top_k: int = 2  # experts that each token uses [paper]
    theta: int = 5  # epochs in which the constraint teaches the prompts, not yet the decoder
    #                 [paper], meaning [ours] D9; the distillation runs from the start
    tau: float = 0.001  # temperature of the softmax over image-text cosines [paper]
    no_moe: bool = False  # one expert instead of the gated mixture
    no_fnp: bool = False  # no feature-level normality promotion
    no_constraint: bool = False  # do not guide the decoded features towards normal text (the
    #                              prompts still learn if the promotion needs them) [ours] D9
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
                "epochs": self.epochs > 0, "seed": self.seed >= 0, "workers": self.workers >= 0,
                "batch_size": self.batch_size > 0 == self.batch_size % COUNT,
                "tau": self.tau > 0, "theta": self.theta >= 0,
                "image_size": self.image_size >= 0, "top_k": 0 < self.top_k <= self.experts,
                "taps": re.fullmatch(r"(\d+(,\d+)*)?", self.taps), "holdout": 0 <= self.holdout < 1,
                "lr": self.lr > 0, "threshold": self.threshold is None or self.threshold > 0,
                "quantile": 0 < self.quantile <= 1, "cache": self.cache in ("on", "off")}.items():
            if not fits:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: see --help")


# ---- frozen teacher: CLIP ------------------------------------------------------------------------
class Teacher(nn.Module):
    """CLIP, both towers: no gradients into its weights, always in eval mode. [paper]

    forward: (B, 3, S, S) -> for each tap (B, 1 + N, C) float16: the CLS token, then the patches row
    by row. Blocks after the last tap are not run. Half precision always, cached or not, so that
    --cache changes the time and nothing else. Raises UserError for impossible taps or sizes.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.random = cfg.weights == "none"
        with torch.random.fork_rng(devices=[]):  # a seed's teacher is the same whatever ran before
            torch.manual_seed(cfg.seed)
            self.clip, self.tokenizer = load_clip(cfg.teacher, cfg.weights, cfg.image_size)
        visual = self.clip.visual
        (self.size, _), (patch, _) = visual.image_size, visual.patch_size
        self.grid, self.width = self.size // patch, visual.class_embedding.shape[0]
        if self.size % patch:
            raise UserError(f"--image-size {self.size}: {cfg.teacher} takes multiples of {patch}")
        depth = len(visual.transformer.resblocks)
        self.taps = [int(t) for t in cfg.taps.split(",")] if cfg.taps else [
            round(depth * i / 3) for i in (1, 2, 3)]
        if self.taps != sorted(set(self.taps) & set(range(1, depth + 1))):
            raise UserError(f"--taps {cfg.taps}: give numbers of blocks, 1 to {depth}, rising")
        if self.random:
            self.register_buffer("mean", torch.zeros(len(self.taps), 1, self.width))
            self.register_buffer("whiten", torch.eye(self.width).repeat(len(self.taps), 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> nn.Module:
        """Stay in eval mode whatever the parent does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Tensor]:
        with autocast(x, torch.float16):
            found = self.clip.visual.forward_intermediates(
                x, indices=[t - 1 for t in self.taps], stop_early=True, intermediates_only=True,
                output_fmt="NLC", output_extra_tokens=True)
        tokens = [torch.cat(pair, dim=1) for pair in zip(
            found["image_intermediates_prefix"], found["image_intermediates"])]
        if self.random:
            tokens = [(F.layer_norm(t.float(), (self.width,)) - mean) @ whiten
                      for t, mean, whiten in zip(tokens, self.mean, self.whiten)]
        return [t.half() for t in tokens]

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
        self.mean.copy_(mean)
        self.whiten.copy_(vectors * (values[:, None] / largest + 1e-3).rsqrt() @ vectors.mT)

    def plain(self, features: list[Tensor]) -> list[Tensor]:
        """Undo the whitening: [(B, 1 + N, C)] -> the same, layer-normalised, less a mean.

        Whitening brings out what tells patches apart, at the cost of what tells classes apart.
        [ours] D17
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


# A CLIP that needs no download: random weights from a seed, small enough for a CPU. [ours] D3
TINY = {"embed_dim": 192,
        "vision_cfg": {"image_size": 128, "patch_size": 16, "width": 192, "layers": 6},
        "text_cfg": {"context_length": 32, "width": 128, "heads": 2, "layers": 3}}


def load_clip(name: str, weights: str, size: int) -> tuple[nn.Module, Callable]:
    """A CLIP and its tokenizer: built here (tiny) or by open_clip, random or with --weights.

    Raises UserError for weights that cannot be had or do not fit, and for a CLIP that is not a
    plain ViT with a CLS token and a text tower of CLIP's kind.
    """
    logging.disable(logging.CRITICAL)  # open_clip logs what we report ourselves
    try:
        if name == "tiny":
            vision = TINY["vision_cfg"] | ({"image_size": size} if size else {})
            clip = open_clip.CLIP(**TINY | {"vision_cfg": vision})
            clip.visual.positional_embedding.data *= 0.3  # drawn at full size, it outweighs texture
            nn.init.orthogonal_(clip.visual.proj)  # the joint space keeps cosines
            if weights != "none":
                open_clip.load_checkpoint(clip, weights)
            tokenizer = open_clip.SimpleTokenizer(context_length=TINY["text_cfg"]["context_length"])
        else:
            clip = open_clip.create_model(
                name, None if weights == "none" else weights, force_image_size=size or None,
                force_quick_gelu=quick_gelu(name, weights), pretrained_text=False)
            tokenizer = open_clip.get_tokenizer(name)
        plain = getattr(clip.visual, "attn_pool", True) is None and clip.visual.pool_type == "tok"
        if not plain or not isinstance(tokenizer, open_clip.SimpleTokenizer):
            raise ValueError("not a plain ViT with a CLS token and a text tower of CLIP's kind")
        return clip, tokenizer
    except Exception as e:  # a failed download, a broken file, an unknown name: many kinds
        raise UserError(f"--teacher {name} --weights {weights}: {str(e)[:200]}; give tiny or a ViT "
                        "of open_clip's, as ViT-B-16, and a tag or file of its weights, or none")
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


# ---- class-agnostic prompts ----------------------------------------------------------------------
class PromptLearner(nn.Module):
    """Two learnable sentences for each tap, the same for all classes: no class name enters.
    [paper] Form: [ours] D16

        normal    [V1] [V2] [V3] [V4] object.
        abnormal  [V1] [V2] [V3] [V4] damaged object.

    .ctx (taps, 4, dim) holds the V, vectors in the place of word embeddings, which start as "a
    photo of a". Nothing but the word "damaged" tells the two apart: a one-class loss lets two free
    contexts drift to where their difference says nothing about defects. Through the frozen text
    tower they become forward() -> (taps, 2, D), unit vectors [t_n, t_a]; .start is what that was
    before any learning.

    .centre and .spread (taps, 1, 1), mean and standard deviation of normal patches' margins, are
    what CNC.track() learns of them.
    """

    SENTENCES = ("a photo of a object.", "a photo of a damaged object.")
    N_CTX = 4  # "a photo of a": a token each

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        clip, taps = teacher.clip, len(teacher.taps)
        self.register_buffer("ids", teacher.tokenizer(self.SENTENCES), persistent=False)
        self.embedding = (getattr(clip, "text", clip).token_embedding,)  # a tuple hides the frozen
        self.encode_text = clip.encode_text  # tower from state_dict() and parameters()
        words = self.embedding[0](self.ids[0, 1:1 + self.N_CTX])
        self.ctx = nn.Parameter(words.detach().repeat(taps, 1, 1))
        self.register_buffer("start", self().detach())
        for name, shape in (("centre", (taps, 1, 1)), ("spread", (taps, 1, 1)), ("steps", ())):
            self.register_buffer(name, torch.zeros(shape))

    def forward(self) -> Tensor:
        def insert(module: nn.Module, args: tuple, words: Tensor) -> Tensor:
            # words: (2 * taps, length, dim): start, context, sentence, end
            ctx = self.ctx.repeat_interleave(2, dim=0).to(words.dtype)
            return torch.cat([words[:, :1], ctx, words[:, 1 + self.N_CTX:]], dim=1)

        # A hook, so that encode_text is open_clip's own: mask, pooling and all.
        hook = self.embedding[0].register_forward_hook(insert)
        try:
            text = self.encode_text(self.ids.repeat(len(self.ctx), 1))
        finally:
            hook.remove()
        return F.normalize(text.float().unflatten(0, (-1, 2)), dim=-1)


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
def promote(v: Tensor, psi: Tensor, text: Tensor) -> Tensor:
    """Feature-level normality promotion: v* = v + psi (t_n - t_a).

    v: unit vectors (taps, B, N, D), psi (taps, B, N) in 0..1, text (taps, 2, D). Returns
    (taps, B, N, D), not normalised. Encoded and decoded patch gain the same, so that the angle
    between them mostly shrinks, the more the more normal the text finds the patch; one that it
    finds abnormal keeps its distance. That it exists is [paper], the form [ours] D13.
    """
    return v + psi[..., None] * (text[:, 0] - text[:, 1])[:, None, None]


class CNC(nn.Module):
    """Reverse distillation with a cross-modal normality constraint.

    This is all that CADA and the shared code need of a detector: `preprocess` for images, `teacher`
    for frozen features of them; called, it gives the loss on these, and `describe` turns them into
    pooled features and a raw anomaly map.
    """

    BALANCE_WEIGHT = 0.01  # [ours] D14

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg, self.teacher, self.text = cfg, Teacher(cfg), None
        stored = getattr(self.teacher.clip.visual, "preprocess_cfg", {})  # of the weights' tag
        self.preprocess = open_clip.image_transform(  # not square? squashed [ours] D19
            self.teacher.size, False, stored.get("mean"), stored.get("std"), resize_mode="squash",
            interpolation=stored.get("interpolation"))
        self.prompts = PromptLearner(self.teacher)
        self.student = Student(len(self.teacher.taps), self.teacher.width,
                               0 if cfg.no_moe else cfg.experts, cfg.top_k)

    def decode(self, features: list[Tensor]) -> tuple[list, list, Tensor]:
        """Teacher features -> encoded and decoded tokens, float32, and the balance loss."""
        encoded = [f.float() for f in features]
        with autocast(features[0], torch.bfloat16):
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

    def patches(self, tokens: list[Tensor]) -> Tensor:
        """Lists of (B, 1 + N, C) -> patches in the joint space, unit vectors (taps, B, N, D)."""
        return torch.stack([self.teacher.joint(f[:, 1:]) for f in tokens])

    def margin(self, v: Tensor, text: Tensor) -> Tensor:
        """<v, t_n - t_a>: how much nearer to the normal text, (taps, B, N, D) -> (taps, B, N).

        No matmul: bf16 and TF32 would round it once more to three digits, and tau asks for more.
        """
        return (v * (text[:, 0] - text[:, 1])[:, None, None]).sum(-1)

    @torch.no_grad()
    def track(self, e: Tensor, text: Tensor) -> None:
        """Mean and standard deviation of encoded normal patches' margins, averaged over all steps.

        What a margin of 0.05 means differs from tap to tap and from CLIP to CLIP; these say it
        without a label. [ours] D13
        """
        self.prompts.steps += 1
        found = torch.std_mean(self.margin(e, text), dim=(1, 2), correction=0, keepdim=True)
        for kept, now in zip((self.prompts.spread, self.prompts.centre), found):
            kept.lerp_(now, 1 / self.prompts.steps)

    def psi(self, e: Tensor, text: Tensor) -> Tensor:
        """The cross-modal control coefficient of encoded patches, (taps, B, N, D) -> (taps, B, N)
        in 0..1: a sigmoid of how many standard deviations the margin is above the average of normal
        patches. [ours] D13"""
        z = (self.margin(e, text) - self.prompts.centre) / (self.prompts.spread + 1e-6)
        return z.sigmoid()

    def distance(self, e: Tensor, d: Tensor, text: Tensor) -> Tensor:
        """1 - cos(e*, d*) of each patch, promoted: (taps, B, N, D) -> (taps, B, N) in 0..2. RD with
        cosine is [paper], patch by patch in the joint space [ours] D12."""
        if not self.cfg.no_fnp:
            psi = self.psi(e, text)
            e, d = promote(e, psi, text), promote(d, psi, text)
        return 1 - F.cosine_similarity(e, d, dim=-1)

    def constraint(self, v: Tensor, text: Tensor) -> Tensor:
        """tau times the cross entropy of softmax(<v, [t_n, t_a]> / tau) against "normal", each
        cosine less its mean over normal patches; mean over patches (taps, B, N, D).

        [paper] target, [ours] D10 form. With two texts that cross entropy is softplus(-margin /
        tau); at tau = 0.001 a hinge: nothing where the margin is above the average, a slope of
        1 / tau below. Times tau, the slope is 1, about that of the distillation.
        """
        lack = self.prompts.centre - self.margin(v, text)
        return self.cfg.tau * F.softplus(lack / self.cfg.tau).mean()

    def forward(self, features: list[Tensor], warm_up: bool = False) -> Tensor:
        """The loss: L = L_distillation + tau L_constraint + 0.01 L_balance, a scalar; plus
        |text - start|^2 in the warm-up.

        In the warm-up the constraint reads *encoded* patches and teaches the prompts to find all
        normal patches alike, held back by their distance to the words they started as; after it,
        *decoded* ones and teaches the decoder, prompts fixed. [ours] D9
        """
        encoded, decoded, balance = self.decode(features)
        e, d = self.patches(encoded), self.patches(decoded)
        learning = warm_up and not (self.cfg.no_fnp and self.cfg.no_constraint)
        text = self.text_features(learning)
        self.track(e, text)
        total = self.distance(e, d, text.detach()).mean() + self.BALANCE_WEIGHT * balance
        if learning:
            total = total + self.constraint(e, text)
            total = total + (text - self.prompts.start).square().sum((1, 2)).mean()
        elif not warm_up and not self.cfg.no_constraint:
            total = total + self.constraint(d, text)
        return total

    def describe(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Teacher features -> (pooled (B, 2 * taps * C), raw anomaly map (B, S, S) in 0..2).

        M = mean over taps of 1 - cos(e*, d*) of each patch, up-sampled; align_corners=False
        ([ours] D15): a token's value belongs to the centre of its patch. Pooled, mean and standard
        deviation over patches, is for CADA: frozen features of the whole image tell its class.
        [ours] D6
        """
        encoded, decoded, _ = self.decode(features)
        e, d = self.patches(encoded), self.patches(decoded)
        m = self.distance(e, d, self.text_features(False)).mean(0)  # (B, N)
        m = m.view(-1, 1, self.teacher.grid, self.teacher.grid)
        maps = F.interpolate(m, (self.teacher.size,) * 2, mode="bilinear", align_corners=False)
        pooled = [t for f in self.teacher.plain(encoded) for t in torch.std_mean(f[:, 1:], dim=1)]
        return torch.cat(pooled, dim=1), maps[:, 0]

    def explain(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the figures show: the anomaly map; what the text alone says, 1 - psi, (B, S, S) in
        0..1; and at each patch the number, from 1, of the expert with the largest weight (B, h, w).
        """
        encoded, grid = [f.float() for f in features], (self.teacher.grid,) * 2
        psi = self.psi(self.patches(encoded), self.text_features(False)).mean(0).unflatten(1, grid)
        text = F.interpolate(1 - psi[:, None], (self.teacher.size,) * 2)[:, 0]
        expert = torch.ones_like(psi)
        if isinstance(self.student.moe, GatedMoE):
            with autocast(features[0], torch.bfloat16):
                x = self.student.fuse(torch.cat(encoded, dim=-1))[:, 1:]
            expert = self.student.moe.route(x.flatten(0, 1))[1][:, 0].view(psi.shape) + 1
        return self.describe(features)[1], text, expert


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
def build(cfg: Config, content: dict) -> CNC:
    """The detector on its device, with the weights of a checkpoint if one is given."""
    torch.manual_seed(cfg.seed)
    detector = CNC(cfg)
    if content:  # strict=False: the weights of a trained teacher are not in it
        detector.load_state_dict(content["weights"], strict=False)
    if detector.teacher.random:
        print("teacher: RANDOM weights, so that text means nothing to it; the numbers are not the "
              "paper's", file=sys.stderr)
    return detector.to(choose_device(cfg.device))


def train_detector(detector: CNC, samples: list[Sample], content: dict) -> dict:
    """Train on normal images, from where `content` (a checkpoint's, or {}) stopped. Returns the new
    content of a checkpoint; {} in all but the first process of torchrun, whose work ends here.
    Raises UserError on a NaN loss.

    Prompts, fusion, experts and decoder learn; the teacher's features are computed without
    gradients. In the first theta epochs the constraint teaches the prompts, afterwards the decoder.
    There is no validation and no best epoch, which could only be chosen on test images: the last
    step counts.
    """
    cfg, share, phase = detector.cfg, samples[RANK::COUNT], None
    step, epoch = content.get("step", 0), len(samples) / cfg.batch_size
    steps = max(1, round(cfg.epochs * epoch))
    if step == steps:  # trained already: no features are needed
        return {} if RANK else content
    if detector.teacher.random and not content:  # of all images: the same in every process
        detector.teacher.estimate_statistics(image_batches(detector, samples))
    features = teacher_features(detector, share)
    parameters = [*detector.student.parameters(), *detector.prompts.parameters()]
    optimizer = torch.optim.Adam(parameters, cfg.lr, fused=True)  # Adam: [paper]; fused: faster
    if content:
        optimizer.load_state_dict(content["optimizer"])
    if COUNT > 1:
        distributed.init_process_group()
    detector.train()
    batches = shuffled(len(share), cfg.batch_size // COUNT, steps, cfg.seed)[step:]
    bar = tqdm(features(batches), "training", steps, initial=step, disable=None)
    for batch in bar:
        warm_up = step < cfg.theta * epoch
        if warm_up != phase:  # DistributedDataParallel must know which parameters learn
            detector.prompts.requires_grad_(warm_up and not (cfg.no_fnp and cfg.no_constraint))
            engine = nn.parallel.DistributedDataParallel(detector) if COUNT > 1 else detector
            phase = warm_up
        torch.manual_seed(hash((cfg.seed, RANK, step)))  # dropout, the same in a resumed run
        loss = engine(batch, warm_up=warm_up)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        due = step % max(1, steps // 10) == 0 or step == steps
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


def train(detector: CNC, samples: list[Sample], content: dict) -> dict:
    """Train the detector on normal images, from where a checkpoint's content stopped; then take the
    threshold from those kept back. Returns the content of the checkpoint that it leaves in --out,
    {} in the further processes of torchrun."""
    kept, held = hold_out(detector.cfg, samples)
    content = train_detector(detector, kept, content)
    if content:
        content["thresholds"] = {"cnc": threshold(detector.cfg, score(detector, held)[0]["cnc"])}
        save_checkpoint(detector, content)
    return content


# ---- evaluation ----------------------------------------------------------------------------------
# Okabe and Ito's colours, one an expert; the fifth for all after it, too.
COLOURS = ListedColormap(["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"])


def score(detector: CNC, samples: list[Sample]) -> tuple[dict, dict]:
    """Anomaly maps of images, {"text": (N, S, S), what the text alone says, "cnc": smoothed}, and
    what else there is to see, as plot_heatmaps() wants it."""
    maps, text, expert = look(detector, samples, detector.explain)
    layers = {"text, 1 - psi": (text, 0, 1, "cividis")}
    if not detector.cfg.no_moe:
        layers["expert"] = expert, 0.5, 5.5, COLOURS
    return {"text": text, "cnc": smooth(maps)}, layers


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
        command, paths, cfg, content = read_command_line(argv, Config, __doc__)
        if command != "train" and "cnc" not in content.get("thresholds", {}):
            raise UserError("no threshold of cnc.py in the checkpoint: --resume its training")
        normal, test = ([], []) if paths else read_dataset(Path(cfg.data))
        detector = build(cfg, content)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        if command == "train":
            content = train(detector, normal, content)
        if paths:
            write_predictions(cfg, content, paths, lambda samples: score(detector, samples)[0])
        elif content and test:  # {} in all but the first process of torchrun
            report(cfg, content, test, *score(detector, test))
        elif content:
            print(f"no test images, so nothing to evaluate; thresholds {content['thresholds']}")
        return 0
    except (UserError, OSError, KeyboardInterrupt) as e:
        told = str(e) or "interrupted; --resume goes on from the last checkpoint, if there is one"
        print(f"cnc.py: error: {' '.join(told.split())}", file=sys.stderr)
        return 130 if isinstance(e, KeyboardInterrupt) else 2


if __name__ == "__main__":
    sys.exit(main())
