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

How text helps, as we read it. CLIP has a joint space of images and texts. There t_n is the vector
of the normal prompt, t_a that of the abnormal one, v that of a patch. The *margin* <v, t_n - t_a>
says how much nearer the patch is to t_n than to t_a. With psi = sigmoid(margin / its standard
deviation) the *promotion* changes a patch's vector e and the decoded one, d [ours] D15:

    e* = e + psi (t_n - t_a),    d* = d + psi (t_n - t_a).

The same difference, longer vectors, a smaller angle: errors in patches that look normal count for
less. The *constraint* moves decoded patches towards t_n, if their margin is unusually low.

    image (B, 3, S, S)               "[V1]..[V4] object." "[V1]..[V4] damaged object." per tap
      |                                                     |
    Teacher, frozen CLIP image tower             PromptLearner, frozen CLIP text tower
      |                                                     |
    tokens (B, 1+N, C) of 3 taps                 t_n, t_a (taps, 2, D), unit vectors
      |                                                     |
    Student: fuse -> (B, 1+N, C)                            |
      |      GatedMoE, 2 of 5 experts a token               |
      |      decode -> the same tokens                      |
      |                                                     |
    joint space: e, d (B, N, D) of each tap  <--- constraint, on d: lifts a margin that is more than
      |                                      |    one standard deviation below the average
      |                                      <--- promotion, on e and d: v* = v + psi(e) (t_n - t_a)
    M = mean over taps of 1 - cos(e*, d*) -> (B, S, S) -> blur -> image score (B,)

From paper to code:

    frozen CLIP [paper], tapped at thirds [port]   Teacher
    class-agnostic learnable prompts [paper]       PromptLearner; their words: [ours] D13
    gated mixture-of-experts [paper]               GatedMoE; residual in Student: [ours] D14
    standardised tokens, centred joint space       NormalStatistics, [ours] D21
    fusion of the taps, decoder [port]             Student
    feature-level normality promotion [paper]      promote, CNC.psi; its form: [ours] D15
    cross-modal normality constraint [paper]       CNC.constraint; its form: [ours] D17
    tau = 0.001 [paper]                            temperature in CNC.constraint; role: [ours] D17
    theta = 5 [paper]                              epochs of warm-up in train; role: [ours] D18
    distillation by cosine [paper]                 CNC.distance; by patches: [ours] D16
    joint space of image and text [ours] D12       Teacher.joint
    anomaly map M of cosines [paper]               CNC.describe, image_score; details: [ours] D20

Read it from the top: first the method, in the order in which an image passes through it, then
training and evaluation. The appendix reads files and writes results. Sections between `shared`
banners stand in cada.py letter for letter.

    python cnc.py                                      train and evaluate; without data/mvtec and
                                                       data/visa on the small set in data/demo
    python cnc.py --data DIR                           on MVTec AD, VisA, or a tree of your own
    python cnc.py eval --checkpoint FILE               the same numbers again
    python cnc.py predict PATH ... --checkpoint FILE   score images, write heat maps
    torchrun --nproc-per-node=N cnc.py ...             train on N GPUs
"""
import csv
import json
import math
import os
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from matplotlib import colormaps
from PIL import Image, ImageOps
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch import distributed, nn
from torch.utils.data import BatchSampler, DataLoader
from torchvision.transforms import Compose, ConvertImageDtype, Normalize, PILToTensor, Resize
from torchvision.transforms import InterpolationMode
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
    """Train and evaluate CNC, evaluate a checkpoint again, or score images with it.

    The defaults are the published settings for MVTec AD [paper], where there are any. (MVTec AD and
    VisA are the field's two usual data sets.) On data/demo DEMO replaces some of them.
    """

    # frozen CLIP [paper]: a ViT of open_clip's, or tiny, a small one built here [ours] D1
    teacher: str = "ViT-L-14-336-quickgelu"
    # of the teacher [paper]: an open_clip tag, a file of a state_dict (OpenAI's TorchScript
    # archives are refused), or none (random). OpenAI's weights need a teacher that ends in
    # -quickgelu
    weights: str = "openai"
    # sides in pixels of the square [paper], a multiple of the teacher's patch; give 128 for tiny.
    # Images that are not square are squashed [ours] D3
    image_size: int = 336
    batch_size: int = 8  # images a training step [paper], of all processes of torchrun together
    epochs: int = 250  # passes over the training images [paper]; for VisA give 200 [paper]
    lr: float = 1e-3  # Adam learning rate [paper], x 0.2 at 80 % of the steps [ours] D22
    experts: int = 5  # experts of the gated mixture [paper]; 1, with --top-k 1: no mixture
    top_k: int = 2  # experts that each token uses [paper]
    # epochs of warm-up, in which the prompts learn, and the constraint does not act on the decoder
    # yet: the number is [paper], this meaning [ours] D18
    theta: int = 5
    tau: float = 0.001  # temperature of the constraint [paper], role [ours] D17
    fnp: bool = True  # feature-level normality promotion [paper], form [ours] D15
    constraint: bool = True  # cross-modal normality constraint [paper], form [ours] D17

    # train (and evaluate), evaluate a checkpoint, or predict: score images of unknown label
    command: Positional[Literal["train", "eval", "predict"]] = "train"
    paths: Positional[tuple[str, ...]] = ()  # for predict: images, or folders of images
    data: str = ""  # data set folder; if not given: data/mvtec, else data/visa, else data/demo
    out: str = "runs/cnc"  # folder for everything that is written
    seed: int = 0  # it decides the weights, the batches, the images held out and the dropout
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
DEMO = {"teacher": "tiny", "weights": "none", "image_size": 128, "epochs": 60, "workers": 0}

TAPS = 3  # blocks of CLIP whose output is read and must be reproduced


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
        self.taps = [round(depth * (i + 1) / TAPS) for i in range(TAPS)]
        # Tokens of a random CLIP are whitened (appendix), those of a trained one stay as they are.
        self.whitening = Whitening(self.width) if self.random else nn.Identity()
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stay in eval mode whatever the parent does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x):
        # open_clip's own way to blocks; it counts them from 0, and here stops at the last tap.
        with half_precision(x, torch.float16):
            found = self.clip.visual.forward_intermediates(
                x, indices=[tap - 1 for tap in self.taps], stop_early=True,
                intermediates_only=True, output_fmt="NLC", output_extra_tokens=True)
        tokens = []
        for cls, patches in zip(found["image_intermediates_prefix"], found["image_intermediates"]):
            tokens.append(torch.cat([cls, patches], dim=1))  # (B, 1 + N, C)
        return [t.half() for t in self.whitening(tokens)]

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

    `ctx` (taps, 4, dim) holds [V1]..[V4], vectors in the place of word embeddings, at first those
    of "a photo of a". Nothing but the word "damaged" tells the two sentences apart, because a
    one-class loss lets two free contexts drift to where their difference says nothing about
    defects.

    forward: a CLIP -> (taps, 2, D), unit vectors t_n and t_a for each tap; `start`: these before
    any learning. The CLIP is not stored here, since it belongs to the teacher.
    """

    # "a object", because both sentences share their context.
    SENTENCES = ("a photo of a object.", "a photo of a damaged object.")
    CONTEXT = slice(1, 5)  # "a photo of a", a token each, after the token of the start

    def __init__(self, clip, tokenizer):
        super().__init__()
        ids = tokenizer(self.SENTENCES)  # (2, length): start, context, sentence, end, padding
        embeddings = clip.token_embedding(ids).detach()  # (2, length, dim)
        self.register_buffer("ids", ids)
        self.register_buffer("embeddings", embeddings)
        self.ctx = nn.Parameter(embeddings[0, self.CONTEXT].repeat(TAPS, 1, 1))
        start = encode_prompts(clip, embeddings, ids).detach()  # (2, D)
        self.register_buffer("start", start.repeat(TAPS, 1, 1))

    def forward(self, clip):
        embeddings = self.embeddings.repeat(TAPS, 1, 1, 1)  # a copy, (taps, 2, length, dim)
        embeddings[:, :, self.CONTEXT] = self.ctx[:, None]
        text = encode_prompts(clip, embeddings.flatten(0, 1), self.ids.repeat(TAPS, 1))
        return text.unflatten(0, (TAPS, 2))


def encode_prompts(clip, embeddings, ids):
    """CLIP's frozen text tower after its embedding layer: embeddings (n, length, dim) and their
    token numbers ids (n, length) -> unit vectors (n, D)."""
    x = clip.transformer(embeddings + clip.positional_embedding, attn_mask=clip.attn_mask)
    x = clip.ln_final(x)  # (n, length, dim)
    # The mask lets a token read those before it, so only the end token has read the sentence. Its
    # id is the largest in CLIP's vocabulary.
    end = ids.argmax(dim=-1)
    text = x[torch.arange(len(x)), end] @ clip.text_projection
    return F.normalize(text.float(), dim=-1)


# ---- student: fusion, mixture of experts, decoder ------------------------------------------------
# Three taps come in, one mixed token a patch goes through the bottleneck, three taps come out
# again. The experts stand in the bottleneck, where patches of all kinds have to share the room.

class GatedMoE(nn.Module):
    """Each token goes through the top_k of num_experts that the gate scores highest. [paper]

    forward: (B, 1 + N, dim) -> y (B, 1 + N, dim) and the balance loss, a scalar.
    y = sum over the chosen experts k of w_k expert_k(x), w = softmax of their gate scores. [port]
    """

    def __init__(self, dim, num_experts, top_k):
        super().__init__()
        # A linear gate, one score an expert. [port]
        self.gate = nn.Linear(dim, num_experts)
        self.top_k = top_k
        self.experts = nn.ModuleList()  # [port]
        for _ in range(num_experts):
            self.experts.append(nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # bf16 would change some choices
            scores = self.gate(x.float())  # (B, 1 + N, experts)
        top, chosen = scores.topk(self.top_k, dim=-1)  # (B, 1 + N, top_k) each
        # A weight for each expert: they add up to 1 over the chosen ones, and the others have 0.
        weights = torch.zeros_like(scores).scatter(-1, chosen, top.softmax(-1))

        # Every expert computes every token, and 3 of 5 answers are multiplied by 0. To pick each
        # expert's tokens would save 5 to 8 % of a step, but make tensors of another size in every
        # step: on a CPU the memory in use would grow, and a GPU would wait for the sizes.
        y = 0.0
        for k, expert_k in enumerate(self.experts):
            y = y + weights[..., k, None] * expert_k(x)

        # (std / mean)^2 of the experts' summed probabilities: 0 when all are equally probable.
        # Without it the gate may settle on two experts that get all tokens and gradients. [ours]
        # D19, after a line of the port that is commented out there.
        load = scores.softmax(-1).sum((0, 1))
        balance = load.var(correction=0) / load.mean() ** 2
        return y, balance


class Student(nn.Module):
    """What CNC trains besides the prompts: fusion, experts, decoder.

    forward: standardised tokens (taps, B, 1 + N, C) -> the same shape, reproduced, and the balance
    loss. Fusion with dropout 0.1, and a decoder of one transformer block a tap, which runs from
    deep to shallow: its first block reproduces the last tap. [port]
    """

    def __init__(self, dim, experts, top_k):
        super().__init__()
        self.fuse = nn.Sequential(nn.Linear(TAPS * dim, dim), nn.LayerNorm(dim), nn.Dropout(0.1))
        self.moe = GatedMoE(dim, experts, top_k)
        # Pre-norm, and heads of 64 channels as in CLIP's own blocks.
        self.blocks = nn.ModuleList()
        for _ in range(TAPS):
            self.blocks.append(nn.TransformerEncoderLayer(
                dim, nhead=dim // 64, dim_feedforward=4 * dim, dropout=0.0,
                activation="gelu", batch_first=True, norm_first=True))

    def forward(self, tokens):
        x = self.fuse(torch.cat([*tokens], dim=-1))  # (B, 1 + N, C)
        mixed, balance = self.moe(x)
        x = x + mixed  # a residual connection, as mixtures in transformers have it [ours] D14
        decoded = []
        for block in self.blocks:
            x = block(x)
            decoded.insert(0, x)  # the block that runs last reproduces the first tap
        return torch.stack(decoded), balance


# ---- CNC -----------------------------------------------------------------------------------------
# Teacher, prompts and student together: what text adds to reverse distillation. First the two small
# formulas, margin and promotion, then the statistics that give them a scale, then the loss.

def difference(text):
    """t_n - t_a of each tap: (taps, 2, D) -> (taps, 1, 1, D)."""
    return (text[:, 0] - text[:, 1])[:, None, None]


def margin(v, text):
    """<v, t_n - t_a>: how much nearer unit vectors v (taps, B, N, D) are to the normal text than to
    the abnormal one. Returns (taps, B, N)."""
    return (v * difference(text)).sum(-1)


def promote(v, psi, text):
    """Feature-level normality promotion: v* = v + psi (t_n - t_a).

    v: unit vectors (taps, B, N, D), psi (taps, B, N) in 0..1, text (taps, 2, D). Returns
    (taps, B, N, D), not normalised, since the cosine that follows does that. That CNC has a
    promotion is [paper], its form [ours] D15.

    Encoded and decoded patch gain the same vector: the same difference, longer vectors, a smaller
    angle. (A patch gets longer if its margin is above -psi |t_n - t_a|^2 / 2. The average patch
    does, since its margin is 0.)
    """
    return v + psi[..., None] * difference(text)


class NormalStatistics(nn.Module):
    """What the tokens of normal images have in common, tap by tap: taken once from training images,
    before the training, and fixed from then on. [ours] D21

    The vectors of a trained CLIP share a large mean (arXiv:2411.14517), perhaps its tokens, too;
    a few channels may be huge in all tokens. Then the cosine of any two is near 1, a decoder that
    always gives the same answer is nearly right, and a margin says nothing. So the student reads
    and answers *standardised* tokens, and patches are *centred* in the joint space: without the
    promotion the distance of a decoder that knows nothing is 1, of one that knows all 0. And no
    direction of the joint space may outweigh the others: where the variance of patches is more than
    8 times the average (chosen by trial), it is *shrunk* to that.
    """

    def __init__(self, width, joint_width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(TAPS, 1, 1, width))  # of the tokens' channels
        self.register_buffer("std", torch.ones(TAPS, 1, 1, width))
        self.register_buffer("centre", torch.zeros(TAPS, 1, 1, joint_width))  # mean of P(e)
        self.register_buffer("shrink", torch.eye(joint_width).repeat(TAPS, 1, 1, 1))
        # What a margin of 0.05 means differs between taps and CLIPs. This is the unit: the standard
        # deviation over patches, by the prompts before any learning. (Their mean is nearly 0.)
        self.register_buffer("margin_std", torch.ones(TAPS, 1, 1))


def spectrum(tokens):
    """Eigenvalues (taps, C) and eigenvectors V (taps, C, C) of the covariance matrix V L V^T of
    vectors (taps, images, N, C), tap by tap."""
    return torch.linalg.eigh(torch.stack([t.T.cov() for t in tokens.flatten(1, 2)]))


class CNC(nn.Module):
    """Reverse distillation with a cross-modal normality constraint.

    This is all that CADA and the shared code ask of a detector:

        preprocess     image -> uint8 tensor (3, S, S)
        standardise    batch of these, on the device -> float (B, 3, S, S), the teacher's input
        teacher        -> features, a list of three float16 tensors; .random: no trained weights
        forward        features -> loss, a scalar
        describe       features -> pooled features (B, F), raw anomaly maps (B, S, S)
        size           S
    """

    BALANCE_WEIGHT = 0.01  # [ours] D19
    # Only decoded patches whose margin is more than this many standard deviations below 0 are
    # guided. Chosen by trial: a larger slack makes a text without meaning less harmful.
    SLACK = 1.0  # [ours] D17

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.size = cfg.image_size
        self.teacher = Teacher(cfg)
        clip = self.teacher.clip
        resize = Resize((self.size, self.size), InterpolationMode.BICUBIC)  # squashed [ours] D3
        self.preprocess = Compose([resize, PILToTensor()])
        normalise_colours = Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        self.standardise = Compose([ConvertImageDtype(torch.float32), normalise_colours])
        self.prompts = PromptLearner(clip, self.teacher.tokenizer)
        self.normal = NormalStatistics(self.teacher.width, clip.visual.output_dim)
        self.student = Student(self.teacher.width, cfg.experts, cfg.top_k)

    @torch.no_grad()
    def take_statistics(self, tokens):
        """Fill in self.normal from the tokens of some normal images, (taps, images, 1 + N, C)."""
        normal = self.normal
        std, normal.mean = torch.std_mean(tokens, dim=(1, 2), keepdim=True)
        normal.std = std + 1e-6  # a constant channel stays finite

        joint = self.teacher.joint(tokens[:, :, 1:])  # (taps, images, N, D)
        normal.centre = joint.mean((1, 2), keepdim=True)
        values, vectors = spectrum(joint)
        excess = (values / values.mean(1, keepdim=True) / 8).clamp(min=1)  # (taps, D)
        normal.shrink[:, 0] = (vectors * excess.rsqrt()[:, None]) @ vectors.mT  # (taps, D, D)

        margins = margin(self.patches(tokens), self.text())
        normal.margin_std = margins.std((1, 2), keepdim=True) + 1e-6

    def decode(self, features):
        """Teacher features -> encoded and decoded tokens, float32 (taps, B, 1 + N, C), and the
        balance loss. The student works on standardised tokens."""
        encoded = torch.stack(features).float()
        standardised = (encoded - self.normal.mean) / self.normal.std
        with half_precision(encoded, torch.bfloat16):
            decoded, balance = self.student(standardised)
        return encoded, decoded.float() * self.normal.std + self.normal.mean, balance

    def text(self):
        """t_n and t_a of each tap, (taps, 2, D)."""
        return self.prompts(self.teacher.clip)

    def patches(self, tokens):
        """Tokens (taps, B, 1 + N, C) -> their patches in the joint space, centred, unit vectors
        (taps, B, N, D)."""
        joint = self.teacher.joint(tokens[:, :, 1:])
        return F.normalize((joint - self.normal.centre) @ self.normal.shrink, dim=-1)

    def psi(self, e, text):
        """The cross-modal control coefficient of encoded patches, (taps, B, N, D) -> (taps, B, N)
        in 0..1: a sigmoid of how many standard deviations the margin is above 0, the average of
        normal patches. [ours] D15"""
        return (margin(e, text) / self.normal.margin_std).sigmoid()

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
        """The cross-modal normality constraint on patches v (taps, B, N, D), a scalar: tau times
        the cross entropy of softmax(cosines to both texts / tau) with the label "normal". That it
        exists and the value of tau are [paper], its form is [ours] D17.

        t_n gets a bonus of `slack` standard deviations. At tau = 0.001 the loss is nearly a hinge:
        0 for a margin above -slack std, and else how far it falls short, on the scale of a cosine.
        """
        cosines = torch.einsum("tbnd,tkd->tbnk", v, text)
        to_normal, to_abnormal = cosines.unbind(-1)
        bonus = slack * self.normal.margin_std
        logits = torch.stack([to_normal + bonus, to_abnormal], dim=-1) / self.cfg.tau
        return -self.cfg.tau * logits.log_softmax(dim=-1)[..., 0].mean()

    def prompt_loss(self, e, text):
        """What the prompts learn from encoded normal patches: to lift every margin below 0, which
        is the average. The squared distance |text - start|^2 holds t_n and t_a near their start:
        else t_a would move away from all normal patches and lose its meaning. [ours] D13"""
        drift = (text - self.prompts.start).square().sum((1, 2)).mean()
        return self.constraint(e, text, slack=0.0) + drift

    def forward(self, features, warm_up=False):
        """The loss, a scalar: L = L_distillation + 0.01 L_balance + (in the warm-up: prompt_loss;
        after it: constraint). The weights are [ours] D19.

        The promotion acts from the first step on. The constraint waits for the end of the warm-up:
        in it *encoded* patches teach the prompts; after it the prompts are fixed, and *decoded*
        patches [paper] teach the decoder. This meaning of theta is [ours] D18.
        """
        encoded, decoded, balance = self.decode(features)
        e = self.patches(encoded)
        d = self.patches(decoded)
        with torch.set_grad_enabled(warm_up):  # no graph where nothing is to be learned
            text = self.text()

        # The distillation must not teach the prompts: they could learn to hide errors.
        fixed_text = text.detach()
        loss = self.distance(e, d, fixed_text).mean() + self.BALANCE_WEIGHT * balance
        if warm_up:
            loss = loss + self.prompt_loss(e, text)
        elif self.cfg.constraint:
            loss = loss + self.constraint(d, fixed_text, self.SLACK)
        return loss

    def describe(self, features):
        """Teacher features -> (pooled (B, 2 * taps * C), raw anomaly map (B, S, S) in 0..2).

        M = mean over taps of 1 - cos(e*, d*) of each patch, up-sampled. A map of 1 - cos is RD's
        [paper], e* and d* are [ours] D15. A token's value belongs to the centre of its patch, hence
        no align_corners [ours] D20. The pooled features, mean and standard deviation over patches,
        are for CADA: frozen features of the whole image tell its class. [ours] D4
        """
        encoded, decoded, _ = self.decode(features)
        e = self.patches(encoded)
        d = self.patches(decoded)
        m = self.distance(e, d, self.text()).mean(0)  # over taps: (B, N)
        grid = m.view(-1, 1, self.teacher.grid, self.teacher.grid)
        maps = F.interpolate(grid, self.size, mode="bilinear")[:, 0]

        std, mean = torch.std_mean(encoded[:, :, 1:], dim=2)  # (taps, B, C) each
        return torch.cat([*mean, *std], dim=1), maps


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
# Which part learns when: see `CNC.forward`. With torchrun several processes train together, each on
# its share of the images.

def all_tokens(cfg, detector, samples):
    """The tokens of all samples at once, float32 (taps, samples, 1 + N, C)."""
    batches = [torch.stack(features) for features in image_features(cfg, detector, samples)]
    return torch.cat(batches, dim=1).float()


def train(cfg, detector, samples, checkpoint):
    """Train on normal images, from where the checkpoint stopped if there is one. Returns the new
    checkpoint.

    Prompts, fusion, experts and decoder learn; the teacher's features are computed without
    gradients. There is no validation and no choice of a best epoch, which only test images would
    allow: the last step counts.
    """
    steps = max(1, round(cfg.epochs * len(samples) / cfg.batch_size))
    start, losses = first_step(cfg, checkpoint, steps)
    if start == steps:  # trained already
        return checkpoint
    if start == 0:  # with torchrun in every process, from the same images
        chosen = samples[::math.ceil(len(samples) / 128)]  # enough: each has many patches
        if detector.teacher.random:  # this changes the tokens
            detector.teacher.whitening.estimate(all_tokens(cfg, detector, chosen))
        detector.take_statistics(all_tokens(cfg, detector, chosen))

    # [paper]; the teacher's parameters have no gradients
    optimizer = torch.optim.Adam(detector.parameters(), cfg.lr, fused=True)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    # Under torchrun the gradient is the mean over all processes. After the warm-up the prompts have
    # no gradient: hence find_unused_parameters.
    model = detector
    if WORLD_SIZE > 1:
        distributed.init_process_group()
        model = nn.parallel.DistributedDataParallel(detector, find_unused_parameters=True)

    share = samples[RANK::WORLD_SIZE]  # the images of this process
    batches = shuffled_batches(cfg, len(share), steps)
    stream = training_features(cfg, detector, share, batches[start:])
    detector.train()
    stream = tqdm(stream, "training", steps, initial=start, disable=None)
    for step, features in enumerate(stream, start + 1):
        # The rate follows from the step alone, so a resumed run needs no state of a scheduler. It
        # falls [ours] D22: else the result would be that of one lucky or unlucky last step.
        optimizer.param_groups[0]["lr"] = cfg.lr * (0.2 if step > 0.8 * steps else 1)
        torch.manual_seed(cfg.seed + WORLD_SIZE * step + RANK)  # dropout as in an unbroken run

        epoch = (step - 1) * cfg.batch_size / len(samples)  # a batch may reach into the next
        loss = model(features, warm_up=epoch < cfg.theta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if step % math.ceil(steps / 10) == 0 or step == steps:  # about ten times
            losses[step] = loss.item()
            checkpoint = {"images": [s.name for s in samples], "step": step, "losses": losses,
                          "optimizer": optimizer.state_dict()}
            save_checkpoint(cfg, detector, checkpoint)
            remove_results(cfg)  # those of an earlier run, which are not this checkpoint's

    if WORLD_SIZE > 1:
        distributed.destroy_process_group()
    return checkpoint


# ---- calibration and evaluation ------------------------------------------------------------------

def calibrate(cfg, detector, held_images):
    """Take the threshold from normal images that were kept back from training. Returns what the
    checkpoint keeps of it."""
    scores = [image_score(smooth(raw)) for _, raw in describe_images(cfg, detector, held_images)]
    threshold = conformal_threshold(torch.cat(scores))
    return {"thresholds": {"cnc": threshold}}


def evaluate(cfg, detector, test, checkpoint):
    """Report how well the maps tell good from defective test images, and what the text knows."""
    maps = [smooth(raw) for _, raw in describe_images(cfg, detector, test)]
    variants = [("cnc", torch.cat(maps))]
    report(cfg, test, detector.size, variants, "cnc", checkpoint)
    report_text(cfg, detector, test[::math.ceil(len(test) / 128)])  # every k-th image will do


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
        used, held = hold_out(cfg, normal, checkpoint)
        samples = [normal[i] for i in used]
        checkpoint = train(cfg, detector, samples, checkpoint)
        if RANK > 0:  # of torchrun's processes only the first evaluates and writes
            return
        checkpoint = checkpoint | calibrate(cfg, detector, [normal[i] for i in held])
        save_checkpoint(cfg, detector, checkpoint)
    if test:
        evaluate(cfg, detector, test, checkpoint)


# ---- Appendix ------------------------------------------------------------------------------------
# First what only this script needs: what the text knows, rules for settings, the detector as it is
# at the start or in a checkpoint, CLIP from its library, and a random one that needs no download.
# Then what any such script needs.

@torch.no_grad()
def report_text(cfg, detector, samples):
    """Print whether the text knows anything: how well -margin tells defective patches from others,
    or without masks defective images by their lowest margin. psi and the constraint rest on that,
    and a plain CLIP may even see it the wrong way round: its patches are known to prefer the
    background (arXiv:2304.05653)."""
    e = detector.patches(all_tokens(cfg, detector, samples))
    margins = margin(e, detector.text()).cpu()  # (taps, N, patches)
    defective = load_masks(samples, detector.teacher.grid)  # a patch, if its centre is
    if not defective.any():
        defective = np.array([s.label for s in samples])
        margins = margins.amin(2)
    if 0 < defective.mean() < 1:
        found = [f"{100 * roc_auc_score(defective.ravel(), -m.ravel()):.1f}" for m in margins]
        print("AUROC of the text alone, by tap:", *found, "(50: it says nothing; below: it "
              "misleads, take --no-fnp --no-constraint)")


# Written into checkpoints. Whoever changes what they hold changes this name, too.
WRITER = "cnc.py (format 2)"
# By command, the settings that may differ from a checkpoint's. "train" is for --resume, the only
# training that reads a checkpoint.
FREE = {"train": "command checkpoint out weights device workers resume data cache epochs lr",
        "eval": "command checkpoint out weights device workers data batch_size",
        "predict": "command checkpoint out weights device workers paths batch_size"}


def check_method(cfg):
    """Raises UserError for settings that CNC cannot have."""
    if not 1 <= cfg.top_k <= cfg.experts:
        raise UserError("--top-k: give a number from 1 to --experts")
    if cfg.constraint and cfg.theta >= cfg.epochs:
        raise UserError("--theta: give less than --epochs, or the decoder is never guided")


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


def load_clip(cfg):
    """A CLIP and its tokenizer: tiny, or open_clip's of that name. Raises UserError for weights
    that cannot be had or do not fit, and for a CLIP that is not a plain ViT with a CLS token and a
    text tower of CLIP's kind."""
    name = cfg.teacher
    weights = cfg.weights
    try:
        if name == "tiny":
            clip = tiny_clip(cfg.image_size)
            if weights != "none":
                open_clip.load_checkpoint(clip, weights)
            tokenizer = open_clip.SimpleTokenizer(context_length=32)
        else:
            # Weights that were trained with QuickGELU, x * sigmoid(1.702 x), as OpenAI's were,
            # would run with plain GELU and be a little wrong in every block. For a tag open_clip
            # warns, and we stop; for a file it cannot tell.
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "QuickGELU mismatch")
                # open_clip knows itself whether these weights are a tag or a file. pretrained_text
                # is about text towers of Hugging Face's; CLIP's own comes with `pretrained`.
                pretrained = None if weights == "none" else weights
                clip = open_clip.create_model(name, pretrained, force_image_size=cfg.image_size,
                                              pretrained_text=False)
            tokenizer = open_clip.get_tokenizer(name)
        plain = isinstance(clip, open_clip.CLIP) and clip.visual.pool_type == "tok"
        if not (plain and isinstance(tokenizer, open_clip.SimpleTokenizer)):
            raise ValueError("not a plain ViT with a CLS token and a text tower of CLIP's kind")
        return clip, tokenizer
    except Exception as e:  # a failed download, a broken file, an unknown name: many kinds
        raise UserError(f"--teacher {name} --weights {weights}: {str(e)[:200]}; give tiny or a "
                        "plain ViT of open_clip's, such as ViT-B-16-quickgelu, and a tag of its "
                        "weights, a file of them in float32, or none")


def tiny_clip(size):
    """A CLIP for images of size x size pixels that needs no download: random weights from a seed,
    small enough for a CPU. [ours] D1"""
    vision = {"image_size": size, "patch_size": 16, "width": 192, "layers": 6}
    text = {"context_length": 32, "width": 128, "heads": 2, "layers": 3}
    clip = open_clip.CLIP(embed_dim=192, vision_cfg=vision, text_cfg=text)
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
        self.register_buffer("mean", torch.zeros(TAPS, 1, 1, width))
        self.register_buffer("matrix", torch.eye(width).repeat(TAPS, 1, 1))

    def forward(self, tokens):
        """(B, 1 + N, C) of each tap -> (taps, B, 1 + N, C). Tokens differ in length from block to
        block and from CLS to patch, hence the layer normalisation."""
        tokens = torch.stack(tokens).float()
        return (F.layer_norm(tokens, tokens.shape[-1:]) - self.mean) @ self.matrix[:, None]

    def estimate(self, tokens):
        """Take mean and covariance from tokens of training images (taps, images, 1 + N, C) as
        `forward` gives them with mean 0 and matrix 1."""
        self.mean = tokens.mean((1, 2), keepdim=True)
        # With the covariance V L V^T of a tap this is V (L / l_max + 1/1000)^(-1/2) V^T: directions
        # with less than a thousandth of the largest variance count as noise, which stays small.
        values, vectors = spectrum(tokens.double())
        scale = (values / values[:, -1:] + 1e-3).rsqrt()
        self.matrix = ((vectors * scale[:, None]) @ vectors.mT).float()


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
