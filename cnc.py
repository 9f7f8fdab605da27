r"""CNC: language keeps the decoder from reproducing defects (AAAI 2025, arXiv:2501.00346).

Wang, Wang, Bai, Lim, Xiao. CNC: Cross-modal Normality Constraint for Unsupervised Multi-class
Anomaly Detection, 2025. This is a reconstruction from public facts, and every choice says where it
comes from: [paper] is stated in the paper's abstract, captions or settings; [port] was seen only in
a third party's port to face images (github.com/olgi9911/CNC-FAS), which proves nothing about the
paper; [author], in shared sections, in public code of CADA's first author; [ours] is a reading of
ours. D1, D2, ... number our readings in the README's list of departures.

The idea. A frozen CLIP describes the image, and a decoder that has seen normal images only must
reproduce the description; where it fails, the image is anomalous. But many classes teach the
decoder so many kinds of patches that it reproduces anomalies too ("over-generalisation"). CNC
guides the decoded features towards learnable prompts that mean "normal", whatever the class. And it
sends each patch through 2 of 5 experts, so that patches of different kinds disturb each other less.

How text helps, as we read it [ours] D15, [ours] D17. CLIP has a joint space of images and texts.
There t_n is the vector of the normal prompt and t_a that of the abnormal one. The margin of a patch
says how much nearer it is to t_n than to t_a, and psi in 0..1 says how normal that is. The
*constraint* moves decoded patches towards t_n, if their margin is unusually low. The *promotion*
adds psi (t_n - t_a) to a patch e and to its decoded version d. Their difference stays and both get
longer, mostly, so the angle between them shrinks: errors in patches that look normal count for
less. If a text means nothing, psi is random.

A "tap" is a block of CLIP whose output is read and must be reproduced.

    image (B, 3, S, S)               "[V1]..[V4] object." "[V1]..[V4] damaged object." per tap
      |                                                     |
    Teacher, frozen CLIP image tower             PromptLearner, frozen CLIP text tower
      |                                                     |
    e1, e2, e3 (B, 1+N, C), from 3 taps          t_n, t_a (taps, 2, D), unit vectors
      |                                                     |
    Student: fuse -> (B, 1+N, C)                            |
      |      GatedMoE, 2 of 5 experts a token               |
      |      decode -> d1, d2, d3 (B, 1+N, C)               |
      |                                                     |
    P(e), P(d): CLIP's joint space (B, N, D) <--- constraint: lifts the margin of d, where it is
      |                                      |    far below the average of normal patches
      |                                      <--- promotion: v* = v + psi(e) (t_n - t_a), v = e, d
    M = mean over taps of 1 - cos(e*, d*) -> (B, S, S) -> blur -> image score (B,)

From paper to code:

    frozen CLIP [paper], tapped at thirds [port]   Teacher
    class-agnostic learnable prompts [paper]       PromptLearner; their words: [ours] D13
    gated mixture-of-experts [paper]               GatedMoE; its residual: [ours] D14
    fusion of the taps, decoder [port]             Student
    feature-level normality promotion [paper]      promote, CNC.psi; its form: [ours] D15
    cross-modal normality constraint [paper]       CNC.constraint; its form: [ours] D17
    tau = 0.001 [paper]                            temperature in CNC.constraint; role: [ours] D17
    theta = 5 [paper]                              epochs of warm-up in train; role: [ours] D18
    distillation by cosine [paper]                 CNC.distance; by patches: [ours] D16
    joint space of image and text [ours] D12       Teacher.joint
    anomaly map M of cosines [paper]               CNC.describe, image_score; details: [ours] D20

Read it from the top. Down to the appendix it is the paper: the method, in the order in which an
image passes through it, then training and evaluation. The appendix is what any such script needs.
Sections between `shared` banners stand in cada.py letter for letter.

    python cnc.py                                      train and evaluate; without data/mvtec and
                                                       data/visa on the small set in data/demo
    python cnc.py --data DIR                           on MVTec AD, VisA, or a tree of your own
    python cnc.py --no-moe --no-fnp --no-constraint    reverse distillation without CNC's parts
    python cnc.py eval --checkpoint FILE               the same numbers again
    python cnc.py predict PATH ... --checkpoint FILE   score images, write heat maps
    torchrun --nproc-per-node=N cnc.py ...             train on N GPUs
    python cada.py --cnc FILE                          one threshold for all classes (cada.py)
"""
import csv
import json
import logging
import math
import os
import signal
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.pop("MPLBACKEND", None)  # figures are files here; a notebook's backend may be missing

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
from torch import distributed, nn
from torch.utils.data import BatchSampler, DataLoader
from torchvision.transforms import Compose, ConvertImageDtype, Normalize, PILToTensor, Resize
from torchvision.transforms import InterpolationMode
from tqdm import tqdm
from tyro.conf import Positional


# ---- settings ------------------------------------------------------------------------------------
# The comment beside or above a field is also what --help says.

@dataclass
class Config:
    """Train and evaluate CNC, evaluate a checkpoint again, or score images with it.

    The defaults are the published settings for MVTec AD [paper], where there are any. (MVTec AD and
    VisA are the field's two usual data sets.) On data/demo a tiny teacher and fewer epochs replace
    them.
    """

    # frozen CLIP [paper]: a ViT of open_clip's, or tiny, a small one built here [ours] D1.
    # OpenAI's weights want a name that ends in -quickgelu
    teacher: str = "ViT-L-14-336-quickgelu"
    weights: str = "openai"  # of the teacher [paper]: open_clip tag, file, or none: random
    # sides in pixels of the square [paper] that images are squashed to [ours] D3, a multiple of the
    # teacher's patch; give 128 for tiny
    image_size: int = 336
    batch_size: int = 8  # images a training step [paper], of all processes of torchrun together
    epochs: int = 250  # passes over the training images [paper]; for VisA give 200 [paper]
    lr: float = 1e-3  # Adam learning rate [paper]
    experts: int = 5  # experts of the gated mixture [paper]
    top_k: int = 2  # experts that each token uses [paper]
    # epochs of warm-up; the number is [paper]. In them the prompts learn and do not guide the
    # decoder yet, which is [ours] D18
    theta: int = 5
    tau: float = 0.001  # temperature of the constraint [paper], role [ours] D17
    moe: bool = True  # gated mixture of experts; --no-moe: one expert for all tokens
    fnp: bool = True  # feature-level normality promotion
    constraint: bool = True  # guide the decoded features towards normal text

    # train (and evaluate), evaluate a checkpoint, or predict: score images of unknown label
    command: Positional[Literal["train", "eval", "predict"]] = "train"
    paths: Positional[tuple[str, ...]] = ()  # for predict: images, or folders of images
    data: str = ""  # data set folder; if not given: data/mvtec, else data/visa, else data/demo
    out: str = "runs/cnc"  # folder for everything that is written
    seed: int = 0  # it decides the weights, the batches, the images held out and the dropout
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
        if self.top_k > self.experts:
            raise UserError("--top-k: give at most --experts")
        if self.constraint and self.theta >= self.epochs:
            raise UserError("--theta: give less than --epochs, or the decoder is never guided")


# Settings that a checkpoint fixes: with other ones it would not fit, or not mean the same.
FIXED = ("teacher", "image_size", "experts", "top_k", "theta", "tau", "moe", "fnp", "constraint",
         "seed", "holdout")
RANGES = {"image_size": (16, 4096), "batch_size": (1, 10**6), "epochs": (1, 10**6), "lr": (0, 1),
          "experts": (1, 1000), "top_k": (1, 1000), "theta": (0, 10**6), "tau": (1e-6, 1e3),
          "seed": (0, 2**32 - 1), "holdout": (0, 0.9), "workers": (0, 1000)}

# On the demo set two CPU cores are enough. [ours] D1
DEMO = {"teacher": "tiny", "weights": "none", "image_size": 128, "epochs": 30, "workers": 0}


# ---- frozen teacher: CLIP ------------------------------------------------------------------------
# CLIP has learned from captions, so that an image and a text which fit each other lie close
# together. Its image tower is what the student must reproduce; its text tower is the judge of what
# is normal.

class Teacher(nn.Module):
    """CLIP [paper], both towers: no gradients into its weights, always in eval mode.

    forward: (B, 3, S, S) -> for each of three taps (B, 1 + N, C): the CLS token, which stands for
    the whole image, then the patches row by row. The taps are the blocks at one third, two thirds
    and all of the depth [port]. The tokens are float16, so that they can be stored. [ours] D2
    Raises UserError for an impossible size, and for weights that cannot be had or do not fit.
    """

    def __init__(self, cfg):
        super().__init__()
        self.random = cfg.weights == "none"
        # A random stream of its own: teacher and student do not depend on each other's draws.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.clip, self.tokenizer = load_clip(cfg)
        visual = self.clip.visual
        patch = visual.patch_size[0]
        if cfg.image_size % patch:
            raise UserError(f"--image-size: {cfg.teacher} takes multiples of {patch}")
        self.grid = cfg.image_size // patch
        self.width = visual.class_embedding.shape[0]
        depth = len(visual.transformer.resblocks)
        self.taps = [round(depth * third / 3) for third in (1, 2, 3)]
        # Tokens of a random CLIP are whitened (appendix); those of a trained one stay as they are.
        self.whitening = Whitening(self.width) if self.random else None
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stay in eval mode whatever the parent does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x):
        # open_clip's own way to intermediate blocks; it counts them from 0, and stops at the last.
        with autocast(x, torch.float16):
            found = self.clip.visual.forward_intermediates(
                x, indices=[tap - 1 for tap in self.taps], stop_early=True,
                intermediates_only=True, output_fmt="NLC", output_extra_tokens=True)
        tokens = []
        for cls, patches in zip(found["image_intermediates_prefix"], found["image_intermediates"]):
            tokens.append(torch.cat([cls, patches], dim=1))  # (B, 1 + N, C)
        if self.random:
            tokens = self.whitening(tokens)
        return [t.half() for t in tokens]

    def joint(self, tokens):
        """P(f): tokens of any tap (..., C) -> unit vectors in the space shared with text (..., D).

        CLIP's own frozen head, though it was made for the CLS token of the last block [ours] D12. A
        learned head may collapse: one that maps everything to one vector has no loss.
        """
        return F.normalize(self.clip.visual.ln_post(tokens) @ self.clip.visual.proj, dim=-1)


# ---- class-agnostic prompts ----------------------------------------------------------------------
# A prompt is a sentence whose first words are not words but vectors that can be learned.

class PromptLearner(nn.Module):
    """Learnable sentences without a class name, the same for all classes [paper]; two for each tap,
    in this form [ours] D13, after the template of AnomalyCLIP:

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

    def __init__(self, clip, tokenizer, taps):
        super().__init__()
        ids = tokenizer(self.SENTENCES)  # (2, length): start, context, sentence, end, padding
        words = clip.token_embedding(ids).detach()  # (2, length, dim)
        self.register_buffer("ids", ids)
        self.register_buffer("words", words)
        self.ctx = nn.Parameter(words[0, 1:1 + self.N_CTX].repeat(taps, 1, 1))
        start = encode_prompts(clip, words, ids).detach()  # (2, D)
        self.register_buffer("start", start.repeat(taps, 1, 1))

    def forward(self, clip):
        taps = len(self.ctx)
        words = self.words.repeat(taps, 1, 1, 1)  # a copy, (taps, 2, length, dim)
        words[:, :, 1:1 + self.N_CTX] = self.ctx[:, None]
        text = encode_prompts(clip, words.flatten(0, 1), self.ids.repeat(taps, 1))
        return text.unflatten(0, (taps, 2))


def encode_prompts(clip, words, ids):
    """CLIP's frozen text tower, from its word embeddings on: words (n, length, dim), and their
    tokens ids (n, length) -> unit vectors (n, D)."""
    x = clip.transformer(words + clip.positional_embedding, attn_mask=clip.attn_mask)
    x = clip.ln_final(x)  # (n, length, dim)
    # The mask lets a token read those before it, so only the end token has read the sentence. Its
    # id is the largest in CLIP's vocabulary.
    end = ids.argmax(dim=-1)
    text = x[torch.arange(len(x)), end] @ clip.text_projection
    return F.normalize(text.float(), dim=-1)


# ---- student: fusion, mixture of experts, decoder ------------------------------------------------
# Three taps come in, one mixed token a patch goes through the bottleneck, three taps come out
# again. The experts stand in the bottleneck, where patches of all kinds have to share the room.

def expert(dim):
    """(..., dim) -> (..., dim). [port]"""
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))


class GatedMoE(nn.Module):
    """Each token goes through the top_k of num_experts that the gate scores highest. [paper]

    forward: (B, N, dim) -> y (B, N, dim) and the balance loss, a scalar.
    y = sum over the chosen experts k of w_k expert_k(x), w = softmax of their gate scores. [port]
    """

    def __init__(self, dim, num_experts, top_k):
        super().__init__()
        # A linear gate, one score an expert. [port]
        self.gate = nn.Linear(dim, num_experts)
        self.top_k = top_k
        self.experts = nn.ModuleList(expert(dim) for _ in range(num_experts))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # bf16 would change some choices
            scores = self.gate(x.float())  # (B, N, experts)
        top, chosen = scores.topk(self.top_k, dim=-1)  # (B, N, top_k) each
        # A weight for each expert: they add up to 1 over the chosen ones, and the others have 0.
        weights = torch.zeros_like(scores).scatter(-1, chosen, top.softmax(-1))

        # Every expert computes every token, and 3 of 5 answers are multiplied by 0. To pick each
        # expert's tokens would save 5 to 8 % of a step, but make tensors of another size in every
        # step: on a CPU the memory in use would grow, and a GPU would wait for the sizes.
        y = 0.0
        for k, expert_k in enumerate(self.experts):
            y = y + weights[..., k, None] * expert_k(x)

        # (std / mean)^2 of the experts' summed probabilities: 0 when all are equally probable.
        # Without it the gate may settle on two experts that get all tokens and gradients. [port],
        # where it stands commented out.
        load = scores.softmax(-1).sum((0, 1))
        balance = load.var(correction=0) / load.mean() ** 2
        return y, balance


class Student(nn.Module):
    """What CNC trains besides the prompts: fusion, experts, decoder.

    forward: the teacher's taps [(B, 1 + N, C), ...], float32 -> the same shapes, reproduced, and
    the balance loss. Fusion with dropout 0.1, and a decoder of one transformer block a tap. It runs
    from deep to shallow: its first block reproduces the last tap. [port]
    """

    def __init__(self, taps, dim, experts, top_k):
        super().__init__()
        self.fuse = nn.Sequential(nn.Linear(taps * dim, dim), nn.LayerNorm(dim), nn.Dropout(0.1))
        self.moe = GatedMoE(dim, experts, top_k)
        # Pre-norm, and heads of 64 channels as in CLIP's own blocks.
        self.blocks = nn.ModuleList()
        for _ in range(taps):
            self.blocks.append(nn.TransformerEncoderLayer(
                dim, nhead=max(1, dim // 64), dim_feedforward=4 * dim, dropout=0.0,
                activation="gelu", batch_first=True, norm_first=True))

    def forward(self, features):
        x = self.fuse(torch.cat(features, dim=-1)).float()  # (B, 1 + N, C)
        mixed, balance = self.moe(x)
        x = x + mixed  # a residual connection, as mixtures in transformers have it [ours] D14
        decoded = []
        for block in self.blocks:
            x = block(x)
            decoded.insert(0, x)  # the block that runs last reproduces the first tap
        return decoded, balance


# ---- CNC -----------------------------------------------------------------------------------------
# Teacher, prompts and student together: what text adds to reverse distillation. First the two small
# formulas, margin and promotion, then the statistics that give a margin its scale, then the loss.

def margin(v, text):
    """<v, t_n - t_a>: how much nearer unit vectors v (taps, B, N, D) are to the normal text than to
    the abnormal one, of text (taps, 2, D). Returns (taps, B, N)."""
    direction = text[:, 0] - text[:, 1]  # (taps, D)
    return (v * direction[:, None, None]).sum(-1)


def promote(v, psi, text):
    """Feature-level normality promotion: v* = v + psi (t_n - t_a).

    v: unit vectors (taps, B, N, D), psi (taps, B, N) in 0..1, text (taps, 2, D). Returns
    (taps, B, N, D), not normalised, since the cosine that follows does that. That CNC has a
    promotion is [paper], its form [ours] D15.

    Encoded and decoded patch gain the same vector, so their difference stays, and

        1 - cos(e*, d*) = (|e - d|^2 - (|e*| - |d*|)^2) / (2 |e*| |d*|)

    shrinks if both get longer. A patch gets longer if its margin is above -psi |t_n - t_a|^2 / 2,
    as the average margin was in all that was run here.
    """
    direction = text[:, 0] - text[:, 1]  # (taps, D)
    return v + psi[..., None] * direction[:, None, None]


class NormalMargins(nn.Module):
    """The scale of margins: mean and standard deviation, (taps, 1, 1) each, of the margins of
    encoded normal patches in a training step, averaged over all training steps so far. [ours] D15

    What a margin of 0.05 means differs from tap to tap and from CLIP to CLIP; these two say it
    without any label. The first epochs count, though the prompts still move: their text stays near
    its start. (With torchrun they are of the first process's images.)
    """

    def __init__(self, taps):
        super().__init__()
        self.register_buffer("mean", torch.zeros(taps, 1, 1))
        self.register_buffer("std", torch.zeros(taps, 1, 1))
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def update(self, margins):
        """Take in the margins (taps, B, N) of one training step."""
        std, mean = torch.std_mean(margins, dim=(1, 2), correction=0, keepdim=True)
        self.steps += 1
        self.mean.lerp_(mean, 1 / self.steps)  # a running average: m += (new - m) / steps
        self.std.lerp_(std, 1 / self.steps)


class CNC(nn.Module):
    """Reverse distillation with a cross-modal normality constraint.

    This is all that CADA and the shared code ask of a detector:

        preprocess     image -> uint8 tensor (3, S, S)
        standardise    batch of these, on the device -> float (B, 3, S, S), the teacher's input
        teacher        -> features, a list of three float16 tensors; .random: no trained weights
        forward        features -> loss, a scalar
        describe       features -> pooled features (B, F), raw anomaly maps (B, S, S)
        size           S
        student        the part that learns
    """

    BALANCE_WEIGHT = 0.01  # [ours] D19
    # Only decoded patches whose margin is more than this many standard deviations below the mean
    # are guided. Chosen by trial: so a text without meaning does little harm.
    SLACK = 1.0  # [ours] D17

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.size = cfg.image_size
        self.teacher = Teacher(cfg)
        clip = self.teacher.clip
        taps = len(self.teacher.taps)
        resize = Resize((self.size, self.size), InterpolationMode.BICUBIC)  # squashed [ours] D3
        self.preprocess = Compose([resize, PILToTensor()])
        colours = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
        colours |= getattr(clip.visual, "preprocess_cfg", {})  # what the weights were trained with
        normalise_colours = Normalize(colours["mean"], colours["std"])
        self.standardise = Compose([ConvertImageDtype(torch.float32), normalise_colours])
        self.prompts = PromptLearner(clip, self.teacher.tokenizer, taps)
        self.margins = NormalMargins(taps)
        experts = cfg.experts if cfg.moe else 1
        top_k = cfg.top_k if cfg.moe else 1
        self.student = Student(taps, self.teacher.width, experts, top_k)

    def decode(self, features):
        """Teacher features -> encoded and decoded tokens, float32, and the balance loss."""
        encoded = [f.float() for f in features]
        with autocast(features[0], torch.bfloat16):
            decoded, balance = self.student(encoded)
        return encoded, [d.float() for d in decoded], balance

    def text(self):
        """t_n and t_a of each tap, (taps, 2, D)."""
        return self.prompts(self.teacher.clip)

    def patches(self, tokens):
        """Lists of (B, 1 + N, C) -> patches in the joint space, unit vectors (taps, B, N, D)."""
        return torch.stack([self.teacher.joint(t[:, 1:]) for t in tokens])

    def psi(self, e, text):
        """The cross-modal control coefficient of encoded patches, (taps, B, N, D) -> (taps, B, N)
        in 0..1: a sigmoid of how many standard deviations the margin is above the average of normal
        patches. [ours] D15"""
        deviations = (margin(e, text) - self.margins.mean) / (self.margins.std + 1e-6)
        return deviations.sigmoid()

    def distance(self, e, d, text):
        """1 - cos(e*, d*) of each patch: (taps, B, N, D) -> (taps, B, N) in 0..2. RD with a cosine
        is [paper], patch by patch and in the joint space [ours] D16."""
        if self.cfg.fnp:
            # psi of e for both: d is pushed to look normal, so a psi of d would say nothing.
            psi = self.psi(e, text)
            e = promote(e, psi, text)
            d = promote(d, psi, text)
        return 1 - F.cosine_similarity(e, d, dim=-1)

    def constraint(self, v, text, slack):
        """The cross-modal normality constraint on patches v (taps, B, N, D), a scalar: the cross
        entropy of softmax(<v, [t_n, t_a]> / tau) against "normal", times tau. That it exists and
        the value of tau are [paper], its form is [ours] D17.

        A softmax of two logits sees only their difference, the margin. We first take off a floor
        that most normal patches exceed, mean - slack std: with excess = margin - (mean - slack std)

            tau * cross entropy = tau * log(1 + exp(-excess / tau)),

        at tau = 0.001 nearly a hinge: 0 where the excess is positive, else -excess, so a margin
        weighs as much as a cosine of the distillation. Without the mean, the sign of the average
        margin would decide whether all patches have a gradient or none.
        """
        excess = margin(v, text) - self.margins.mean + slack * self.margins.std  # (taps, B, N)
        logits = torch.stack([excess, torch.zeros_like(excess)], dim=-1) / self.cfg.tau
        normal = torch.zeros(excess.numel(), dtype=torch.long, device=v.device)  # the first text
        return self.cfg.tau * F.cross_entropy(logits.flatten(0, 2), normal)

    def forward(self, features, warm_up=False):
        """The loss, a scalar: L = L_distillation + 0.01 L_balance + (in the warm-up: prompt_loss;
        after it: constraint). The weights are [ours] D19.

        In the warm-up the constraint reads *encoded* patches and teaches the prompts; after it, it
        reads *decoded* patches [paper] and teaches the decoder, and the prompts are fixed. This
        meaning of theta is [ours] D18.
        """
        encoded, decoded, balance = self.decode(features)
        e = self.patches(encoded)
        d = self.patches(decoded)
        text = self.text()
        fixed_text = text.detach()
        self.margins.update(margin(e, fixed_text))

        # The distillation must not teach the prompts: they could learn to hide errors.
        loss = self.distance(e, d, fixed_text).mean() + self.BALANCE_WEIGHT * balance
        if warm_up:
            loss = loss + self.prompt_loss(e, text)
        elif self.cfg.constraint:
            loss = loss + self.constraint(d, fixed_text, self.SLACK)
        return loss

    def prompt_loss(self, e, text):
        """What the prompts learn from encoded normal patches: to lift every margin that is below
        the average so far. |text - start|^2, the distance to the words that they started as, holds
        them back, and keeps "damaged" damaged. [ours] D13"""
        drift = (text - self.prompts.start).square().sum((1, 2)).mean()
        return self.constraint(e, text, slack=0.0) + drift

    def describe(self, features):
        """Teacher features -> (pooled (B, 2 * taps * C), raw anomaly map (B, S, S) in 0..2).

        M = mean over taps of 1 - cos(e*, d*) of each patch, up-sampled. A map of 1 - cos is RD's
        [paper], e* and d* are [ours] D15. A token's value belongs to the centre of its patch, hence
        no align_corners [ours] D20. The pooled features, mean and standard deviation over patches,
        are for CADA: frozen features of the whole image tell its class. [ours] D4
        """
        encoded, decoded, _ = self.decode(features)
        e = self.patches(encoded)  # (taps, B, N, D)
        d = self.patches(decoded)
        m = self.distance(e, d, self.text()).mean(0)  # over taps: (B, N)
        grid = m.view(-1, 1, self.teacher.grid, self.teacher.grid)
        maps = F.interpolate(grid, (self.size, self.size), mode="bilinear")[:, 0]

        pooled = []
        for tokens in encoded:
            std, mean = torch.std_mean(tokens[:, 1:], dim=1)  # (B, C) each
            pooled += [mean, std]
        return torch.cat(pooled, dim=1), maps


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
# The decoder learns from the first step on. In the warm-up the prompts learn too; after it they are
# fixed and guide the decoder. With torchrun several processes train together, each on its share of
# the images.

def build(cfg, checkpoint):
    """The detector on its device, with the weights of a checkpoint if there is one."""
    torch.manual_seed(cfg.seed)  # for the student's weights; the teacher draws apart
    detector = CNC(cfg)
    if checkpoint:
        load_weights(detector, checkpoint)
    if detector.teacher.random:
        print("teacher: RANDOM weights, so that text means nothing to it; the numbers are not the "
              "paper's", file=sys.stderr)
    return detector.to(choose_device(cfg.device))


def train(cfg, detector, samples, checkpoint):
    """Train on normal images, from where the checkpoint stopped if there is one. Returns the new
    checkpoint.

    Prompts, fusion, experts and decoder learn; the teacher's features are computed without
    gradients. There is no validation and no best epoch, which only test images could choose: the
    last step counts.
    """
    steps_an_epoch = len(samples) / cfg.batch_size  # a batch may reach into the next epoch
    steps = max(1, round(cfg.epochs * steps_an_epoch))
    start = checkpoint["step"] if checkpoint else 0
    if start >= steps:  # trained already
        return checkpoint
    # Every process whitens with all images, so that all have the same random teacher.
    if detector.teacher.random and start == 0:
        detector.teacher.whitening.estimate(detector.teacher,
                                            image_batches(cfg, detector, samples))

    parameters = [*detector.student.parameters(), *detector.prompts.parameters()]
    optimizer = torch.optim.Adam(parameters, cfg.lr, fused=True)  # [paper]
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["lr"] = cfg.lr  # a flag overrides the checkpoint
    # Under torchrun the gradient is the mean over all processes. After the warm-up the prompts have
    # no gradient: hence find_unused_parameters.
    engine = detector
    if WORLD_SIZE > 1:
        distributed.init_process_group()
        engine = nn.parallel.DistributedDataParallel(detector, find_unused_parameters=True)

    share = samples[RANK::WORLD_SIZE]  # the images of this process
    batches = shuffled_batches(cfg, len(share), steps)
    features = teacher_features(cfg, detector, share, batches[start:])
    detector.train()
    bar = tqdm(features, "training", steps, initial=start, disable=None)
    for step, encoded in enumerate(bar, start + 1):
        # Dropout draws the same in a resumed run: the hash of integers is always the same.
        torch.manual_seed(hash((cfg.seed, RANK, step - 1)))
        warm_up = step - 1 < cfg.theta * steps_an_epoch
        loss = engine(encoded, warm_up=warm_up)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        if step % 20 == 0:  # seldom: item() waits for the GPU
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if step % math.ceil(steps / 10) == 0 or step == steps:  # about ten times
            checkpoint = {"images": [(s.cls, s.path.name) for s in samples], "step": step,
                          "optimizer": optimizer.state_dict()}
            save_checkpoint(cfg, detector, checkpoint)

    if WORLD_SIZE > 1:
        distributed.destroy_process_group()
    return checkpoint


# ---- calibration and evaluation ------------------------------------------------------------------

def calibrate(cfg, detector, held):
    """Take the threshold, and the mean that pictures show as black, from normal images that were
    kept back from training. Returns what the checkpoint keeps of it."""
    parts = [(image_score(smooth(maps)), maps.mean((1, 2)))
             for _, maps in describe_images(cfg, detector, held)]
    scores, means = map(torch.cat, zip(*parts))  # (N,) each
    return {"thresholds": {"cnc": conformal_threshold(scores)},
            "means": {"cnc": means.mean().item()}}


def evaluate(cfg, detector, test, checkpoint):
    """Report how well the maps tell good from defective test images."""
    maps = [smooth(raw) for _, raw in describe_images(cfg, detector, test)]
    report(cfg, test, detector.size, [("cnc", torch.cat(maps))], "cnc", checkpoint)


# ---- the script ----------------------------------------------------------------------------------

def run(argv):
    """The whole story: load, train, calibrate, evaluate; or load and predict."""
    cfg, checkpoint = read_command_line(argv)
    if cfg.command == "predict":
        samples = images_to_score(cfg)
        detector = build(cfg, checkpoint)
        maps = (smooth(raw) for _, raw in describe_images(cfg, detector, samples))
        write_predictions(cfg, samples, maps, checkpoint, "cnc")
        return

    normal, test = read_dataset(Path(cfg.data), cfg.command == "train")
    detector = build(cfg, checkpoint)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    if cfg.command == "train":
        kept, held = hold_out(cfg, normal, checkpoint)
        samples = [normal[i] for i in kept]
        checkpoint = train(cfg, detector, samples, checkpoint)
        if RANK > 0:  # of torchrun's processes only the first evaluates and writes
            return
        checkpoint = checkpoint | calibrate(cfg, detector, [normal[i] for i in held])
        save_checkpoint(cfg, detector, checkpoint)
    if test:
        evaluate(cfg, detector, test, checkpoint)


# ---- Appendix: what any such script needs --------------------------------------------------------
# One who reads for the paper may stop here. First CLIP from its library, and the random one that
# needs no download.

def load_clip(cfg):
    """A CLIP and its tokenizer: tiny, or open_clip's of that name.

    Raises UserError for weights that cannot be had or do not fit, and for a CLIP that is not a
    plain ViT with a CLS token and a text tower of CLIP's kind.
    """
    name = cfg.teacher
    weights = cfg.weights
    logging.disable(logging.CRITICAL)  # open_clip logs what we report ourselves
    try:
        if name == "tiny":
            clip = tiny_clip(cfg.image_size)
            if weights != "none":
                open_clip.load_checkpoint(clip, weights)
            tokenizer = open_clip.SimpleTokenizer(context_length=TINY_TEXT["context_length"])
        else:
            # Weights that were trained with QuickGELU, x * sigmoid(1.702 x), as OpenAI's were,
            # would run with plain GELU and be a little wrong in every block. open_clip warns; we
            # stop.
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "QuickGELU mismatch")
                # open_clip knows itself whether these weights are a tag or a file. pretrained_text
                # is about text towers of Hugging Face's; CLIP's own comes with `pretrained`.
                pretrained = None if weights == "none" else weights
                clip = open_clip.create_model(name, pretrained, force_image_size=cfg.image_size,
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


# A CLIP that needs no download: random weights from a seed, small enough for a CPU. [ours] D1
TINY_TEXT = {"context_length": 32, "width": 128, "heads": 2, "layers": 3}


def tiny_clip(size):
    """The small CLIP for images of size x size pixels."""
    vision = {"image_size": size, "patch_size": 16, "width": 192, "layers": 6}
    clip = open_clip.CLIP(embed_dim=192, vision_cfg=vision, text_cfg=TINY_TEXT)
    clip.visual.positional_embedding.data *= 0.3  # tuned: as it is drawn, it outweighs texture
    nn.init.orthogonal_(clip.visual.proj)  # as good as a rotation: the joint space keeps cosines
    return clip


class Whitening(nn.Module):
    """For a random CLIP: tokens of each tap, layer-normalised and whitened, so that they have no
    mean and all directions but the weakest are of one size. [ours] D1

    A random network says little more than the mean colour of a patch: that one direction drowns all
    others in a cosine, and a decoder learns it at once. Whitening brings texture up to its size.
    """

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, width))
        self.register_buffer("matrix", torch.eye(width).repeat(3, 1, 1))

    def forward(self, tokens):
        """[(B, 1 + N, C)] -> the same. Tokens differ in length from block to block and from CLS to
        patch, hence the layer normalisation."""
        whitened = []
        for t, mean, matrix in zip(tokens, self.mean, self.matrix):
            normalised = F.layer_norm(t.float(), (t.shape[-1],))
            whitened.append((normalised - mean) @ matrix)
        return whitened

    def estimate(self, teacher, batches):
        """Take mean and covariance from the tokens of training images, tap by tap."""
        # Sums over all tokens, in float64, because a difference of two large ones follows.
        count = 0
        total = torch.zeros(self.mean.shape, dtype=torch.float64)
        products = torch.zeros(self.matrix.shape, dtype=torch.float64)
        for x in batches:
            # (taps, B * (1 + N), C), only layer-normalised: the matrix is the identity as yet
            tokens = torch.stack(teacher(x)).flatten(1, 2).cpu().double()
            count += tokens.shape[1]
            total += tokens.sum(1, keepdim=True)
            products += tokens.mT @ tokens

        mean = total / count  # (taps, 1, C)
        covariance = products / count - mean.mT @ mean  # (taps, C, C); of one tap: V L V^T
        self.mean.copy_(mean)
        # The whitening matrix of a tap is W = V (L / l_max + 1/1000)^(-1/2) V^T. Directions with
        # less than a thousandth of the largest variance count as noise, which stays small.
        for tap in range(3):
            values, vectors = torch.linalg.eigh(covariance[tap])  # (C,), rising, and (C, C)
            scale = (values / values[-1] + 1e-3).rsqrt()
            self.matrix[tap] = (vectors * scale) @ vectors.T


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
