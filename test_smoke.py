"""Do the two scripts do what they say?

    pytest -q test_smoke.py       needs no GPU, no network and no data set
    python test_smoke.py bench    measures instead: time, memory, and what a text that means
                                  something is worth

The first part shows the ideas of both papers on a few numbers. The next two look into the two
detectors, one after the other. Then come the data, the scripts as a user runs them, what the README
says, and what happens to bad input. The scripts run on a made data set of two classes.
"""
import csv
import gc
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from scipy import ndimage
from sklearn.cluster import KMeans
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch.testing import assert_close

import cada
import cnc

HERE = Path(__file__).resolve().parent
DEMO = HERE / "data/demo"
BOTH = pytest.mark.parametrize("script", [cada, cnc], ids=["cada", "cnc"])
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
torch.set_num_threads(1)  # the tensors are so small that a second thread costs more than it gains

# What makes a run small: two steps of RevDist; six of CNC, of which three are warm-up.
SMALL = "--image-size 64 --weights none --batch-size 4 --holdout 0.2 --workers 0 --device cpu "
FLAGS = {
    cada: (SMALL + "--teacher resnet18 --iters 2").split(),
    cnc: (SMALL + "--teacher tiny --epochs 2 --theta 1").split(),
}


def run(script, *words) -> int:
    """Run a command line in this process and return its exit code."""
    try:
        return script.main([str(word) for word in words])
    except SystemExit as stop:  # tyro's, for what it cannot parse
        return stop.code


def small_detector(script, **settings):
    """A detector with its random weights, in eval mode."""
    teacher = "resnet18" if script is cada else "tiny"
    small = {"teacher": teacher, "weights": "none", "image_size": 64, "device": "cpu", "workers": 0}
    return script.build(script.Config(**small | settings), None).eval()


def random_images(count: int) -> torch.Tensor:
    """Noise in the place of preprocessed images, always the same."""
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# ==== the ideas: CNC ==============================================================================
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_mixture_is_the_dense_sum(top_k):
    """Only the chosen experts are computed. The result is that of all experts, weighted by a
    softmax in which those that were not chosen have a score of minus infinity."""
    torch.manual_seed(0)
    moe = cnc.GatedMoE(8, 5, top_k)
    x = torch.randn(2, 30, 8)
    computed = []
    for expert in moe.experts:
        expert.register_forward_hook(lambda module, args, output: computed.append(len(output)))
    y, _ = moe(x)
    assert sum(computed) == 60 * top_k

    scores = moe.gate(x)
    lowest_chosen = scores.topk(top_k).values[..., -1:]
    weights = scores.masked_fill(scores < lowest_chosen, -math.inf).softmax(-1)
    dense = torch.zeros_like(x)
    for k, expert in enumerate(moe.experts):
        dense += weights[..., k, None] * expert(x)
    assert_close(y, dense, rtol=0, atol=1e-6)


def test_gradient_reaches_gate_and_chosen_experts():
    """An expert that no token has chosen learns nothing, and nor does its row of the gate."""
    moe = cnc.GatedMoE(8, 5, 2)
    moe.gate.weight.data.zero_()
    moe.gate.bias.data = torch.tensor([0.0, 3, 0, 4, 0])  # all tokens go to experts 1 and 3
    y, _ = moe(torch.randn(2, 30, 8))
    y.square().sum().backward()
    assert moe.gate.weight.grad.any(1).tolist() == [False, True, False, True, False]
    for k, expert in enumerate(moe.experts):
        assert expert[0].weight.grad.any() == (k in (1, 3))


def test_balance_loss_evens_the_experts():
    """It is 0 if all are used alike, 4 if one of five gets all, and lowers the favourite."""
    moe = cnc.GatedMoE(8, 5, 2)
    moe.gate.weight.data.zero_()
    for favour, expected in ((0.0, 0), (3.0, None), (30.0, 4)):
        moe.gate.bias.data = torch.tensor([favour, 0, 0, 0, 0])
        _, balance = moe(torch.randn(2, 30, 8))
        if expected is not None:
            assert balance.item() == pytest.approx(expected, abs=1e-3)
        else:
            balance.backward()
            assert moe.gate.bias.grad[0] > 0 > moe.gate.bias.grad[2]


@pytest.mark.parametrize("tau", [0.001, 0.07, 1.0])
def test_constraint_is_a_cross_entropy(tau):
    """The constraint is the softmax cross entropy of centred cosines, in which the normal text is
    right. With two texts this is a softplus of the margin; at tau = 0.001 it is nearly a hinge."""
    detector = small_detector(cnc, tau=tau)
    v = F.normalize(torch.randn(3, 2, 16, 192), dim=-1)  # (taps, B, N, D)
    text = F.normalize(torch.randn(3, 2, 192), dim=-1)  # (taps, 2, D): t_n and t_a
    detector.margins.update(cnc.margin(v, text))
    found = detector.constraint(v, text).item()

    cosines = torch.einsum("lbnd,lkd->lbnk", v.double(), text.double())
    centred = cosines - cosines.mean((1, 2), keepdim=True)
    logits = centred.flatten(0, 2) / tau
    normal = torch.zeros(len(logits), dtype=torch.long)
    assert found == pytest.approx(tau * F.cross_entropy(logits, normal).item(), abs=1e-6)

    margin = centred[..., 0] - centred[..., 1]
    assert found == pytest.approx(tau * F.softplus(-margin / tau).mean().item(), abs=1e-6)
    if tau == 0.001:
        assert found == pytest.approx(F.relu(-margin).mean().item(), rel=0.01)


def test_promotion_draws_normal_patches_together():
    """psi, in 0..1, grows with the margin and is a half for the average patch. The more normal a
    patch, the nearer the decoded one is moved to it."""
    detector = small_detector(cnc, taps=(6,))
    t_n, t_a, content, mistake = torch.eye(192)[:4]
    text = torch.stack([t_n, t_a])[None]  # (1, 2, D)
    share = torch.linspace(0, 1, 5)[:, None]  # of five patches, more and more normal
    e = F.normalize(content + share * t_n + (1 - share) * t_a, dim=-1)[None, None]  # (1, 1, 5, D)
    d = F.normalize(e + 0.3 * mistake, dim=-1)
    detector.margins.update(cnc.margin(e, text))

    psi = detector.psi(e, text)[0, 0]
    assert (psi.diff() > 0).all()
    assert 0 < psi[0] and psi[4] < 1
    assert psi[2].item() == pytest.approx(0.5)
    gain = 1 - F.cosine_similarity(e, d, dim=-1) - detector.distance(e, d, text)
    assert (gain.diff(dim=-1) > 0).all()
    assert torch.equal(cnc.promote(e, torch.zeros(1, 1, 5), text), e)


# ==== the ideas: metrics ==========================================================================
def aupro_by_definition(maps: np.ndarray, masks: np.ndarray) -> float:
    """At every threshold: the share of good pixels that it flags, and the mean over defects of the
    share of each that it flags. AUPRO is the area under this curve up to a rate of 0.3."""
    defects = []
    for i, mask in enumerate(masks):
        regions, count = ndimage.label(mask, np.ones((3, 3)))
        for k in range(count):
            defects.append((i, regions == k + 1))

    false_positives = [0.0]
    overlap = [0.0]
    for threshold in np.unique(maps)[::-1]:
        flagged = maps >= threshold
        shares = [flagged[i][region].mean() for i, region in defects]
        false_positives.append(flagged[~masks].mean())
        overlap.append(np.mean(shares))
    fine = np.linspace(0, 0.3, 300_001)
    return np.trapezoid(np.interp(fine, false_positives, overlap), fine) / 0.3


@pytest.mark.parametrize("case", ["one region", "many regions", "ties", "perfect"])
def test_metrics_by_definition(case):
    """AUROC, AP and F1max are scikit-learn's, for images and pixels; AUPRO is as defined above."""
    rng = np.random.default_rng(0)
    masks = np.zeros((5, 12, 12), bool)
    masks[0, 2:6, 3:9] = True
    if case != "one region":  # of different areas, some diagonal; image 4 stays good
        masks[1, [0, 1, 2], [0, 1, 2]] = True
        masks[1, 8:, 9:] = True
        masks[2:4] = rng.random((2, 12, 12)) < 0.1
    maps = rng.normal(size=masks.shape) + 1.5 * masks
    if case == "ties":
        maps = maps.round()
    if case == "perfect":
        maps = masks + 0.1 * rng.random(masks.shape)

    labels = masks.ravel()
    scores = maps.ravel()
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / (precision + recall + 1e-12)
    expected = {"AUROC": roc_auc_score(labels, scores), "F1max": f1.max(),
                "AP": average_precision_score(labels, scores)}
    of_images = cada.ranking_metrics("I", scores, labels)
    of_pixels = cada.ranking_metrics("P", maps, masks)
    for name, value in expected.items():
        assert of_images["I-" + name] == pytest.approx(value, abs=1e-6)
        assert of_pixels["P-" + name] == pytest.approx(value, abs=1e-6)
        assert case != "perfect" or value == pytest.approx(1)
    assert of_pixels["AUPRO"] == pytest.approx(aupro_by_definition(maps, masks), abs=1e-4)


# ==== the ideas: CADA =============================================================================
LEVEL = torch.tensor([0.05, 0.2, 0.4, 0.1, 0.7])  # of five classes
SPREAD = torch.tensor([0.02, 0.1, 0.05, 0.3, 0.15])


def five_classes(seed: int, raised: float) -> tuple:
    """200 images: features around one centre a class; maps of level_c + spread_c * noise, in every
    second one with a patch that is `raised`. Returns features, maps, classes and labels."""
    rng = torch.Generator().manual_seed(seed)
    classes = torch.arange(5).repeat_interleave(40)
    labels = torch.arange(200) % 2
    centres = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    features = centres[classes] + 0.3 * torch.randn(200, 64, generator=rng)
    noise = torch.randn(200, 32, 32, generator=rng).abs()
    noise[1::2, 10:13, 10:13] += raised
    maps = LEVEL[classes, None, None] + SPREAD[classes, None, None] * noise
    return features, maps, classes, labels


def fit(features, maps):
    """CADA on some normal images."""
    return cada.CADA.fit(features, cada.map_statistics(maps), seed=0)


def auroc(scores, labels) -> float:
    """The share of pairs of a bad and a good image in which the bad one scores higher."""
    return roc_auc_score(labels, scores)


def test_cada_undoes_the_distortion_of_classes():
    """One ranking of all images becomes nearly as good as for one who knows the classes, and the
    order within the classes stays, but for a little."""
    features, maps, *_ = five_classes(1, raised=0)
    head = fit(features, maps)
    features, maps, classes, labels = five_classes(2, raised=2.5)
    raw = maps.amax((1, 2))
    aligned = cada.normalise(maps, *head.predict(features)).amax((1, 2))
    known = (raw - LEVEL[classes]) / SPREAD[classes]
    assert auroc(aligned, labels) > auroc(known, labels) - 0.03
    assert auroc(aligned, labels) > auroc(raw, labels) + 0.15
    losses = []
    for rows in torch.arange(200).split(40):  # class by class
        losses.append(auroc(raw[rows], labels[rows]) - auroc(aligned[rows], labels[rows]))
    assert np.mean(losses) < 0.03


@pytest.mark.parametrize("features, maps", [
    (torch.randn(10, 64), torch.rand(10, 8, 8)),
    (torch.ones(20, 64), torch.rand(20, 8, 8)),
    (torch.randn(10, 64), torch.zeros(10, 8, 8)),
    (torch.randn(20, 64), torch.full((20, 8, 8), 100.0)),
], ids=["few images", "equal images", "zero maps", "flat maps"])
def test_gamma_is_above_u_for_any_images(features, maps):
    """Alignment divides by gamma - u, so neither few nor degenerate images may make it 0."""
    head = fit(features, maps)
    for scale in (0, 1, 1e3, -1e6):  # images that it has never seen the like of
        u, gamma = head.predict(torch.cat([features, scale * torch.randn(9, 64)]))
        assert u.isfinite().all()
        assert gamma.isfinite().all()
        assert (gamma > u).all()


def test_regression_looks_where_maps_differ():
    """Two classes whose features are alike, but for one quiet channel, and whose maps are not. A
    loud pose, the same in both, hides this channel from whoever groups images by features alone."""
    def images_of(seed):
        rng = torch.Generator().manual_seed(seed)
        label = torch.arange(400) % 2
        pose = torch.randint(0, 6, (400,), generator=rng)
        features = 0.2 * torch.randn(400, 64, generator=rng)
        features[torch.arange(400), pose] += 3
        features[:, 10] += 0.8 * label
        maps = torch.rand(400, 16, 16, generator=rng) * (1 + 2 * label[:, None, None])
        return features, maps, label

    features, maps, label = images_of(0)
    groups = KMeans(2, n_init=3, random_state=0).fit_predict(features)
    agree = (groups == label.numpy()).mean()
    assert 0.4 < agree < 0.6  # chance

    head = fit(features, maps)
    features, _, label = images_of(1)
    u, _ = head.predict(features)
    right = (u / (0.5 + label)).log().abs() < 0.1
    assert right.float().mean() > 0.8


def test_a_constant_channel_has_no_say():
    """A channel that never varied in training may be anything later."""
    features, maps, *_ = five_classes(1, raised=0)
    features[:, 5] = 0.3
    head = fit(features, maps)
    changed = features.clone()
    changed[:, 5] += 0.01
    assert torch.equal(head.predict(features)[0], head.predict(changed)[0])


def test_cada_aligns_each_image_by_itself():
    """The other images of a batch do not matter, and a fit depends on its seed alone."""
    features, maps, *_ = five_classes(1, raised=0)
    head = fit(features, maps)
    u, gamma = head.predict(features)
    assert_close(head.predict(features[3:4]), (u[3:4], gamma[3:4]))
    torch.manual_seed(99)
    np.random.seed(99)
    again = fit(features, maps)
    assert_close(again.predict(features), (u, gamma), rtol=0, atol=0)


def test_snapping_forgives_small_errors():
    """Features that are a little off move what the regression says of every image by some per cent.
    Snapped, most images keep u, and a level gives all its images the same two numbers."""
    features, maps, *_ = five_classes(1, raised=0)
    head = fit(features, maps)
    features, *_ = five_classes(2, raised=0)
    off = features + 0.3 * torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    alone = head.regress(off)[0] / head.regress(features)[0]
    snapped = head.predict(off)[0] / head.predict(features)[0]
    assert ((alone - 1).abs() > 0.02).float().mean() > 0.5
    assert ((snapped - 1).abs() < 0.02).float().mean() > 0.8
    pairs = torch.stack(head.predict(off), dim=1)
    assert len(pairs.unique(dim=0)) <= len(head.centres)


# ==== RevDist =====================================================================================
def test_parameters_of_wide_resnet50_2():
    """They are RD's table. Nothing reads layer4 of the teacher, so it is not there."""
    with torch.device("meta"):
        student = cada.Student("wide_resnet50_2")
        teacher = cada.Teacher("wide_resnet50_2", "none", 0)
    expected = [
        (48.26, [student.bottleneck]),
        (17.84, [student.decode3]),
        (5.32, [student.decode2]),
        (1.76, [student.decode1]),
        (10.62, [student.fuse1, student.fuse2]),
        (83.80, [student]),
        (0.63, [teacher.layer1]),
        (3.48, [teacher.layer2]),
        (20.74, [teacher.layer3]),
        (24.86, [teacher]),
    ]
    for millions, modules in expected:
        count = sum(p.numel() for module in modules for p in module.parameters())
        assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("name, c1", [("wide_resnet50_2", 256), ("resnext50_32x4d", 256),
                                      ("resnet18", 64)])
def test_shapes_of_revdist(name, c1):
    """The student answers in the teacher's shapes, also with other kinds of residual blocks."""
    with torch.device("meta"):
        student = cada.Student(name)
        encoded = cada.Teacher(name, "none", 0)(torch.empty(2, 3, 256, 256))
    decoded = student([e.float() for e in encoded])
    shapes = [(2, c1, 64, 64), (2, 2 * c1, 32, 32), (2, 4 * c1, 16, 16)]
    assert [e.shape for e in encoded] == shapes
    assert [d.shape for d in decoded] == shapes
    code = student.bottleneck(torch.empty(2, 12 * c1, 16, 16, device="meta"))
    assert code.shape == (2, 8 * c1, 8, 8)


def test_loss_and_map_of_revdist_are_cosine_distances():
    """In the loss a position counts by the length of its vector, and not in the map."""
    detector = small_detector(cada)
    features = detector.teacher(random_images(2))
    for factor, distance in ((1, 0.0), (-1, 2.0)):
        detector.student.forward = lambda encoded, factor=factor: [factor * e for e in encoded]
        assert detector(features).item() == pytest.approx(3 * distance, abs=1e-4)
        maps = detector.describe(features)[1]
        assert_close(maps, torch.full((2, 64, 64), distance), rtol=0, atol=1e-4)

    def longer_to_the_right(encoded):
        return [e * torch.linspace(1, 9, e.shape[-1]) for e in encoded]

    detector.student.forward = longer_to_the_right
    assert detector(features).item() > 0.1
    assert detector.describe(features)[1].abs().max() < 1e-4


def test_blur_and_image_score():
    """The blur has a sigma of 4 at 256 pixels and commutes with the alignment; the score is the
    mean of the highest 1 %."""
    point = torch.zeros(1, 256, 256)
    point[0, 128, 128] = 1
    offset = torch.arange(256.0) - 128
    variance = cada.smooth(point)[0].sum(0) @ offset.square()
    assert variance == pytest.approx(16, rel=0.01)

    maps = torch.rand(3, 64, 64)
    u = torch.tensor([0.1, 0.5, 0.9])
    gamma = torch.tensor([0.3, 0.9, 1.0])
    one = cada.smooth(cada.normalise(maps, u, gamma))
    other = cada.normalise(cada.smooth(maps), u, gamma)
    assert_close(one, other, rtol=0, atol=1e-4)
    assert cada.image_score(torch.arange(200.0).reshape(1, 10, 20)).tolist() == [198.5]


# ==== CNC =========================================================================================
@pytest.fixture(scope="module")
def tokens() -> list[torch.Tensor]:
    """What the small teacher says of three images: a float16 tensor (3, 1 + N, C) for each tap."""
    return small_detector(cnc).teacher(random_images(3))


@pytest.fixture
def on_meta(monkeypatch):
    """open_clip's models without memory or numbers, of any size in no time."""
    create = open_clip.create_model

    def create_on_meta(*args, **more):
        with torch.device("meta"):
            return create(*args, device="meta", **more)

    monkeypatch.setattr(open_clip, "create_model", create_on_meta)


@pytest.mark.parametrize("name, size, patch, taps, width, joint, activation", [
    ("ViT-B-32", 224, 32, [4, 8, 12], 768, 512, "GELU"),
    ("ViT-L-14-336-quickgelu", 336, 14, [8, 16, 24], 1024, 768, "QuickGELU")])
def test_shapes_of_cnc(name, size, patch, taps, width, joint, activation, on_meta):
    """Without the mixture, whose routing needs numbers."""
    with torch.device("meta"):
        detector = cnc.CNC(cnc.Config(teacher=name, weights="none", moe=False))
        features = detector.teacher(torch.empty(2, 3, size, size))
        encoded, decoded, _ = detector.decode(features)
        joined = detector.teacher.joint(encoded[0])
    assert detector.teacher.taps == taps
    tokens = 1 + (size // patch) ** 2
    for t in features + encoded + decoded:
        assert t.shape == (2, tokens, width)
    assert features[0].dtype == torch.float16
    assert joined.shape == (2, tokens, joint)
    assert detector.text().shape == (3, 2, joint)
    clip = detector.teacher.clip
    for block in (*clip.visual.transformer.resblocks, *clip.transformer.resblocks):
        assert type(block.mlp.gelu).__name__ == activation


def test_taps_and_joint_space_are_clips():
    """No block after the last tap is run. The CLS token of the last block, projected, is what CLIP
    says of the image."""
    teacher = small_detector(cnc, taps=(1, 4, 5)).teacher
    teacher.random = False  # as if it were trained: its tokens are CLIP's own
    outputs = []
    for block in teacher.clip.visual.transformer.resblocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    images = random_images(2)
    found = teacher(images)
    assert len(outputs) == 5
    for tap, number in enumerate((1, 4, 5)):
        assert torch.equal(found[tap], outputs[number - 1].half())

    teacher.taps = [6]
    last = teacher.joint(teacher(images)[0].float())[:, 0]
    expected = F.normalize(teacher.clip.encode_image(images), dim=-1)
    assert_close(last, expected, rtol=0, atol=2e-3)  # float16


def test_prompts_are_clips_own_words():
    """Before training they are what CLIP says of the two sentences, which differ in one word. Only
    the context that both have in common learns, from one sentence too."""
    detector = small_detector(cnc)
    clip = detector.teacher.clip
    prompts = detector.prompts
    normal, abnormal = prompts.SENTENCES
    assert abnormal.replace("damaged ", "") == normal
    said = clip.encode_text(detector.teacher.tokenizer(prompts.SENTENCES))
    expected = F.normalize(said, dim=-1).expand(3, -1, -1)
    assert_close(detector.text(), expected, rtol=0, atol=1e-5)
    assert_close(prompts.start, expected, rtol=0, atol=1e-5)

    prompts(clip)[:, 0, 0].sum().backward()
    assert [name for name, _ in prompts.named_parameters()] == ["ctx"]
    assert prompts.ctx.grad.any(-1).all()


def cnc_gradients(tokens, warm_up: bool, **settings) -> tuple:
    """The gradients of the whole loss: the student's as one vector, and the prompts' or None."""
    detector = small_detector(cnc, **settings)
    detector(tokens, warm_up).backward()
    found = [p.grad.flatten() for p in detector.student.parameters() if p.grad is not None]
    return torch.cat(found), detector.prompts.ctx.grad


def test_warm_up_teaches_the_prompts_then_the_decoder(tokens):
    """The constraint has a gradient into the prompts first, and into the student after it."""
    early, early_prompts = cnc_gradients(tokens, True)
    free, _ = cnc_gradients(tokens, True, constraint=False)
    assert early_prompts.any()
    assert torch.equal(early, free)
    late, late_prompts = cnc_gradients(tokens, False)
    free, _ = cnc_gradients(tokens, False, constraint=False)
    assert late_prompts is None
    assert (late - free).norm() > 0.01 * late.norm()


def test_cnc_without_its_parts_is_reverse_distillation(tokens):
    """The loss is the mean cosine distance of the patches in joint space, and no prompt learns."""
    plain = {"moe": False, "fnp": False, "constraint": False}
    detector = small_detector(cnc, **plain)
    encoded, decoded, _ = detector.decode(tokens)
    e = detector.teacher.joint(torch.stack(encoded))[:, :, 1:]
    d = detector.teacher.joint(torch.stack(decoded))[:, :, 1:]
    distance = 1 - F.cosine_similarity(e, d, dim=-1).mean().item()
    for warm_up in (True, False):
        assert detector(tokens, warm_up).item() == pytest.approx(distance, abs=1e-6)
        assert cnc_gradients(tokens, warm_up, **plain)[1] is None


def test_map_of_cnc_shows_where_the_decoder_fails(tokens):
    """All patches are reproduced but one: the map is highest at its centre and 0 above its
    neighbours. And the map of an image does not depend on the others."""
    detector = small_detector(cnc, fnp=False)
    maps = detector.describe(tokens)[1]
    alone = detector.describe([t[1:2] for t in tokens])[1]
    assert_close(alone, maps[1:2], rtol=0, atol=1e-5)

    row = 2  # of four, and the second column; a patch has 16 x 16 pixels
    column = 1

    def fail_at_one_patch(encoded):
        decoded = [e.clone() for e in encoded]
        for d in decoded:
            d[:, 1 + 4 * row + column] *= -1
        return decoded, torch.zeros(())

    detector.student.forward = fail_at_one_patch
    maps = detector.describe(tokens)[1]
    highest = maps.amax((1, 2))
    assert highest.min() > 0.3
    assert_close(maps[:, 16 * row + 8, 16 * column + 8], highest)
    assert maps[:, :16 * (row - 1) + 8].abs().max() < 1e-4


# ==== both detectors ==============================================================================
@BOTH
def test_only_the_student_learns(script):
    """No gradient reaches the teacher, and nothing in it changes, running statistics included."""
    detector = small_detector(script).train()
    teacher = detector.teacher
    before = deepcopy(teacher.state_dict())
    learners = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learners, 0.1)
    for _ in range(2):
        detector(teacher(random_images(4))).backward()
        optimizer.step()
    for name, p in detector.student.named_parameters():
        assert p.grad.any(), name
    for name, weights in teacher.state_dict().items():
        assert torch.equal(weights, before[name]), name
    for name, p in teacher.named_parameters():
        assert p.grad is None, name
    assert not any(module.training for module in teacher.modules())


@BOTH
@torch.no_grad()
def test_bfloat16_is_close_to_float32(script, monkeypatch):
    """This is what a GPU runs, as far as a CPU can run it."""
    detector = small_detector(script)
    features = detector.teacher(random_images(3))
    exact_loss = detector(features)
    exact = detector.describe(features)[1]
    monkeypatch.setattr(script, "autocast", lambda *_: torch.autocast("cpu", torch.bfloat16))
    loss = detector(features)
    maps = detector.describe(features)[1]
    assert maps.dtype == loss.dtype == torch.float32
    assert not torch.equal(maps, exact)  # else nothing ran in bfloat16
    assert_close(maps, exact, rtol=0, atol=0.04)
    assert_close(loss, exact_loss, rtol=0.02, atol=0.02)


def some_steps_on(device: str, script, data, trained, cache: bool, out: Path) -> tuple:
    """Three more steps of a trained detector. Returns their losses, and the maps of the test images
    after them."""
    normal, test = script.read_dataset(data)
    checkpoint = torch.load(trained[script].checkpoint, weights_only=True)
    more = {"iters": 5} if script is cada else {"epochs": 2.75}
    settings = checkpoint["config"] | more | {"device": device, "cache": cache, "out": str(out)}
    detector = script.build(script.Config(**settings), checkpoint)
    for module in detector.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # each device draws for itself
    losses = []
    detector.register_forward_hook(lambda module, args, output: losses.append(output.item()))
    script.train_detector(detector, normal[:16], checkpoint)
    maps = script.run_on_images(detector, test, lambda f: [detector.describe(f)[1]])[0]
    return losses, maps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cache", [True, False])
@BOTH
def test_a_gpu_agrees_with_the_cpu(script, cache, data, trained, tmp_path, capsys):
    """It trains, describes and predicts the same, but for half precision."""
    losses, maps = some_steps_on("cpu", script, data, trained, cache, tmp_path)
    gpu_losses, gpu_maps = some_steps_on("cuda", script, data, trained, cache, tmp_path)
    assert len(losses) == 3
    assert_close(gpu_losses, losses, rtol=0.01, atol=0)
    assert_close(gpu_maps, maps, rtol=0, atol=0.02 * (maps.max() - maps.min()).item())

    words = [data / "a/test/hole/000.png", "--checkpoint", trained[script].checkpoint]
    scores = []
    for device in ("cpu", "cuda"):
        assert run(script, "predict", *words, "--out", tmp_path, "--device", device) == 0
        scores.append(predictions(capsys)[0]["score"])
    assert scores[1] == pytest.approx(scores[0], rel=0.02)


# ==== data ========================================================================================
def draw(path: Path, seed: int, grain: float = 6, size: tuple = (64, 64),
         mask: Path | None = None) -> None:
    """Write an image of noise that is blurred by `grain` pixels; with a red hole if it is to have a
    mask, which is written too."""
    rng = np.random.default_rng(seed)
    width, height = size
    noise = rng.normal(0, 60, (height, width, 3))
    texture = 128 + (1 + grain) * ndimage.gaussian_filter(noise, (grain, grain, 0))
    image = Image.fromarray(texture.clip(0, 255).astype(np.uint8))
    if mask:
        x, y = rng.integers(5, 35, 2).tolist()
        hole = (x, y, x + 18, y + 14)
        ImageDraw.Draw(image).ellipse(hole, fill=(250, 20, 20))
        truth = Image.new("L", size)
        ImageDraw.Draw(truth).ellipse(hole, fill=255)
        mask.parent.mkdir(parents=True, exist_ok=True)
        truth.save(mask)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="session")
def session_path():
    """Removed at the end, other than pytest's own: checkpoints are large."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path():
    """Removed at the end, other than pytest's own: checkpoints are large."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def data(session_path) -> Path:
    """An MVTec-style set of two classes, smooth and grainy, with 10 training and 3 + 3 test images
    each. A test that spoils it takes `tree`."""
    root = session_path / "data"
    for cls, grain, size in (("a", 6, (64, 64)), ("b", 0, (80, 64))):
        for i in range(10):
            draw(root / f"{cls}/train/good/{i:03}.png", 50 + i, grain, size)
        for i in range(3):
            draw(root / f"{cls}/test/good/{i:03}.png", 10 + i, grain, size)
            mask = root / f"{cls}/ground_truth/hole/{i:03}_mask.png"
            draw(root / f"{cls}/test/hole/{i:03}.png", 20 + i, grain, size, mask)
    return root


@pytest.fixture
def tree(data, tmp_path) -> Path:
    """A copy of the data set that a test may spoil."""
    return shutil.copytree(data, tmp_path / "tree")


@pytest.fixture
def good(tree) -> Path:
    """The same without test images."""
    for folder in ("a/test", "a/ground_truth", "b/test", "b/ground_truth"):
        shutil.rmtree(tree / folder)
    return tree


@pytest.fixture
def visa(tmp_path) -> Path:
    """A raw VisA tree of one class: 2 training images, 1 good and 2 defective test images. The
    second defect is a single pixel."""
    root = tmp_path / "visa"
    images = ["Normal/0.JPG", "Normal/1.JPG", "Normal/2.JPG", "Anomaly/0.JPG", "Anomaly/1.JPG"]
    for seed, name in enumerate(images):
        draw(root / "pcb/Data/Images" / name, seed, size=(80, 48))
    values = np.zeros((2, 48, 80), np.uint8)
    values[0, 10:20, 20:60] = 1
    values[0, 20:30, 20:60] = 9
    values[1, 1, 2] = 1
    (root / "pcb/Data/Masks/Anomaly").mkdir(parents=True)
    for i in range(2):
        Image.fromarray(values[i]).save(root / f"pcb/Data/Masks/Anomaly/{i}.png")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("""object,split,label,image,mask
pcb,train,normal,pcb/Data/Images/Normal/0.JPG,
pcb,train,normal,pcb/Data/Images/Normal/1.JPG,
pcb,test,normal,pcb/Data/Images/Normal/2.JPG,
pcb,test,anomaly,pcb/Data/Images/Anomaly/0.JPG,pcb/Data/Masks/Anomaly/0.png
pcb,test,anomaly,pcb/Data/Images/Anomaly/1.JPG,pcb/Data/Masks/Anomaly/1.png
""")
    return root


GREY = np.add.outer(np.arange(0, 120, 3), np.arange(0, 100, 2)).astype(np.uint8)  # (40, 50)
COLOURS = np.dstack([GREY, 255 - GREY, GREY // 2])
TURNED = Image.Exif()
TURNED[0x0112] = 6  # how the camera was held


@pytest.mark.parametrize("name, image, expected, error", [
    ("grey-16-bit.png", Image.fromarray(GREY.astype(np.uint16) * 257), np.dstack([GREY] * 3), 0),
    ("float.tif", Image.fromarray(GREY / np.float32(255)), np.dstack([GREY] * 3), 0),
    ("rgba.png", Image.fromarray(np.dstack([COLOURS, GREY])), COLOURS, 0),
    ("turned.png", Image.fromarray(np.rot90(COLOURS).copy()), COLOURS, 0),
    ("palette.png", Image.fromarray(COLOURS).quantize(), COLOURS, 3),
    ("cmyk.JPG", Image.fromarray(COLOURS).convert("CMYK"), COLOURS, 3),
    ("12-of-16-bits.png", Image.fromarray(GREY.astype(np.uint16) * 16), "must lie from 0", 0),
    ("32-bit.tif", Image.fromarray(GREY.astype(np.int32) * 2**20), "must lie from 0", 0),
    ("float-255.tif", Image.fromarray(GREY.astype(np.float32)), "must lie from 0", 0),
], ids=lambda value: value if isinstance(value, str) else "")
def test_any_image_is_read_as_rgb(name, image, expected, error, tmp_path):
    """Sixteen bits, transparency, a turned camera, palettes and CMYK are all understood. Where it
    is not sure which value is white, an error asks."""
    exif = TURNED if name == "turned.png" else Image.Exif()
    image.save(tmp_path / name, exif=exif)
    if isinstance(expected, str):
        with pytest.raises(cada.UserError, match=f"{name}.*{expected}"):
            cada.load_image(tmp_path / name)
        return
    found = cada.load_image(tmp_path / name)
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found) - expected.astype(float)).mean() <= error


DISC = np.hypot(*np.mgrid[-20:20, -20:20]) < 9  # the defect
WHITE = DISC.astype(np.uint8) * 255
CLEAR = np.full_like(WHITE, 255)
INVERTED = Image.fromarray((~DISC).astype(np.uint8), "P")
INVERTED.putpalette([255, 255, 255, 0, 0, 0])  # its number 0 is white
RED = Image.fromarray(DISC.astype(np.uint8), "P")
RED.putpalette([0, 0, 0, 128, 0, 0])


@pytest.mark.parametrize("name, mask, error", [
    ("numbers.png", Image.fromarray(WHITE // 200), 0),
    ("16-bit.png", Image.fromarray(WHITE.astype(np.uint16) * 257), 0),
    ("opaque.png", Image.fromarray(np.dstack([WHITE, CLEAR])), 0),
    ("drawn-on-nothing.png", Image.fromarray(np.dstack([CLEAR, CLEAR, CLEAR, WHITE])), 0),
    ("palette.png", INVERTED, 0),
    ("red.png", RED, 0),
    ("blurred.png", Image.fromarray(ndimage.gaussian_filter(WHITE, 2)), 0.05),
    ("lossy.jpg", Image.fromarray(WHITE), 0.05),
    ("folder", None, 0),
], ids=lambda value: value if isinstance(value, str) else "")
def test_any_mask_is_read_as_black_and_white(name, mask, error, tmp_path):
    """Numbers, transparency, palettes, blur and JPEG; and a folder of partial masks, as in MVTec
    LOCO. The error is a share of the area."""
    path = tmp_path / name
    if mask:
        mask.save(path)
    else:
        path.mkdir()
        for i in range(2):
            part = WHITE.copy()
            part[i * 20:][:20] = 0
            Image.fromarray(part).save(path / f"{i}.png")
    wrong = np.asarray(cada.load_mask(path)) != DISC
    assert wrong.sum() <= error * DISC.sum()


def test_reads_an_mvtec_tree(tree):
    """Masks are paired by name, hidden files are no images, and one class is a data set too."""
    masks = tree / "a/ground_truth/hole"
    images = tree / "a/test/hole"
    (masks / "000_mask.png").rename(masks / "000.png")
    (masks / "002_mask.png").rename(masks / "0_mask.png")
    (images / "002.png").rename(images / "0.PNG")
    for folder in (masks, images, tree / "a/train/good"):
        (folder / "._001.png").write_bytes(b"no image")
        (folder / "Thumbs.db").write_bytes(b"no image")

    train, test = cada.read_dataset(tree)
    assert [s.cls for s in train] == ["a"] * 10 + ["b"] * 10
    assert [s.label for s in test] == [0, 0, 0, 1, 1, 1] * 2
    assert not any(s.label or s.mask for s in train)
    pairs = [(s.path.name, s.mask.name) for s in test[3:6]]
    assert pairs == [("0.PNG", "0_mask.png"), ("000.png", "000.png"), ("001.png", "001_mask.png")]
    train, test = cada.read_dataset(tree / "b")
    assert len(train) == 10
    assert {s.cls for s in train + test} == {"b"}


def test_reads_a_raw_visa_tree(visa):
    """A mask is binarised, then resized as its image is. A defect that is lost in this is still
    one by its label. A spreadsheet may have saved the list."""
    train, test = cada.read_visa(visa)
    assert [s.label for s in train] == [0, 0]
    assert [s.label for s in test] == [0, 1, 1]
    assert test[0].cls == "pcb"
    masks = cada.load_masks(test, 40)
    expected = np.zeros((40, 40), bool)
    expected[8:25, 10:30] = True  # rows 10-29 of 48 and columns 20-59 of 80, whatever their value
    assert np.array_equal(masks[1], expected)
    assert not masks[0].any()
    assert not cada.load_masks(test, 32)[2].any()

    path = visa / "split_csv/1cls.csv"
    path.write_text(path.read_text().replace(",", ";"), encoding="utf-8-sig")
    assert cada.read_visa(visa) == (train, test)


CLEAN = ("{tree}: 2 classes, 20 training, 6 good and 6 defective test images, 6 masks with 4.9% "
         "of their pixels marked; 0 files not used")
MESSY_DATA = [  # (what is done to the data set, what must be printed of it)
    ("", CLEAN),
    ("mkdir a/test/.ipynb; cp a/test/hole/* a/test/.ipynb", CLEAN),
    ("mv a/test/good a/test/OK; mv b/test/good b/test/Normal; mv a/train/good a/train/ok", CLEAN),
    ("cd a/ground_truth/hole; mkdir 000; mv 000_mask.png 000/1.png; cp 000/1.png 000/2.png", CLEAN),
    ("touch a/train/good/000.heic", "; 1 files not used {tree}/a/train/good/000.heic"),
    ("mv a/train/good a/train/deep; mkdir a/train/good; mv a/train/deep a/train/good",
     "no training images in {tree}/a/train/good"),
    ("rm -r a/train", "no training images in {tree}/a/train/good"),
]


@pytest.mark.parametrize("spoil, says", MESSY_DATA)
def test_what_was_found_is_told(spoil, says, tree, capsys):
    """Before the training, in one line. Hidden folders and known names of the good ones are no
    kinds of defects."""
    subprocess.run(spoil, shell=True, check=True, cwd=tree)
    try:
        cada.read_dataset(tree)
        told = capsys.readouterr().err
    except cada.UserError as e:
        told = str(e)
    assert says.format(tree=tree) in told


# ==== the scripts as a user runs them =============================================================
VARIANTS = {cada: ["raw", "oracle", "regress", "cada"], cnc: ["text", "cnc"]}


def scores_of(out: Path) -> list[dict]:
    """The rows of scores.csv."""
    with open(out / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def results_of(out: Path) -> dict:
    """The metrics in metrics.json."""
    return json.loads((out / "metrics.json").read_text())["results"]


def files_in(folder: Path) -> set[str]:
    """What a run has left there, at any depth."""
    return {path.name for path in folder.rglob("*") if path.is_file()}


def as_numbers(out: Path, script) -> np.ndarray:
    """The scores in scores.csv, (images, variants)."""
    table = []
    for row in scores_of(out):
        table.append([float(row[name]) for name in VARIANTS[script]])
    return np.array(table)


def predictions(capsys) -> list[dict]:
    """What predict has printed."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_defaults_are_the_published_ones(data, visa):
    """They are small on the demo set, and a flag goes before everything."""
    cases = [
        (cada, ["--data", data], {
            "teacher": "wide_resnet50_2", "weights": "IMAGENET1K_V1", "image_size": 256,
            "batch_size": 16, "iters": 5000, "lr": 2e-3}),
        (cada, ["--data", DEMO], {"teacher": "resnet18", "image_size": 128, "iters": 200}),
        (cada, ["--data", DEMO, "--iters", "7"], {"teacher": "resnet18", "iters": 7}),
        (cnc, ["--data", data], {
            "teacher": "ViT-L-14-336-quickgelu", "weights": "openai", "batch_size": 8,
            "epochs": 250, "lr": 1e-3, "theta": 5, "tau": 0.001, "experts": 5, "top_k": 2,
            "moe": True, "fnp": True, "constraint": True}),
        (cnc, ["--data", visa], {"teacher": "ViT-L-14-336-quickgelu", "epochs": 200}),
        (cnc, ["--data", DEMO], {"teacher": "tiny", "weights": "none", "epochs": 30}),
    ]
    for script, words, expected in cases:
        argv = [str(word) for word in words]
        cfg, _ = script.read_command_line(argv, script.Config(), script.DEMO, cnc.VISA)
        assert vars(cfg) == vars(cfg) | expected


@pytest.fixture(scope="session")
def trained(data, session_path) -> dict:
    """One training of each script from the shell: its folder, and what it printed."""
    runs = {}
    for script in (cada, cnc):
        name = script.__name__
        out = session_path / name
        command = [sys.executable, f"{name}.py", "--data", data, "--out", out, *FLAGS[script]]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        runs[script] = SimpleNamespace(
            out=out, checkpoint=out / "checkpoint.pt", files=files_in(out), stdout=done.stdout,
            stderr=done.stderr)
    return runs


@BOTH
def test_train_writes_and_prints_what_it_says(script, trained):
    """The metrics are those of the scores that it writes, and the table shows the metrics."""
    done = trained[script]
    pictures = {"heatmaps.png"} if script is cnc else {"heatmaps.png", "distributions.png"}
    assert done.files == {"checkpoint.pt", "metrics.json", "scores.csv"} | pictures
    for name in pictures:
        assert np.asarray(Image.open(done.out / name).convert("L")).std() > 5

    labels = [int(row["label"]) for row in scores_of(done.out)]
    results = results_of(done.out)
    assert list(results) == VARIANTS[script]
    for variant, scores in zip(results, as_numbers(done.out, script).T):
        found = results[variant]
        assert list(found) == ["a", "b", "class mean", "pooled"]
        of_a = auroc(scores[:6], labels[:6])
        of_b = auroc(scores[6:], labels[6:])
        assert found["class mean"]["I-AUROC"] == pytest.approx((of_a + of_b) / 2)
        assert found["pooled"]["I-AUROC"] == pytest.approx(auroc(scores, labels))
        printed = "".join(f"{100 * value:9.1f}" for value in found["pooled"].values())
        assert re.search(rf"^pooled +{variant} +{printed.strip()}$", done.stdout, re.M)
    assert "RANDOM" in done.stderr
    assert "\r" not in done.stderr  # no progress bar in a pipe


@BOTH
def test_eval_repeats_the_numbers(script, trained, tmp_path, capsys):
    """Whatever the size of its batches."""
    done = trained[script]
    words = ["eval", "--checkpoint", done.checkpoint, "--out", tmp_path, "--batch-size", 5]
    assert run(script, *words) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == done.stdout.splitlines()[:-1]
    assert_close(as_numbers(tmp_path, script), as_numbers(done.out, script), rtol=0, atol=1e-4)
    assert files_in(tmp_path) == done.files - {"checkpoint.pt"}


@BOTH
def test_predict_gives_the_same_scores(script, data, trained, tmp_path, monkeypatch, capsys):
    """It takes files and folders, and needs no data set."""
    monkeypatch.setattr(script, "read_dataset", None)
    paths = [data / "b/test", data / "a/test/hole/001.png"]
    words = ["--checkpoint", trained[script].checkpoint, "--out", tmp_path]
    assert run(script, "predict", *paths, *words) == 0
    rows = {row["path"]: row for row in scores_of(trained[script].out)}
    found = predictions(capsys)
    assert len(found) == len({told["overlay"] for told in found}) == 7
    for told in found:
        row = rows[told["path"]]
        assert told["score"] == pytest.approx(float(row[script.__name__]), abs=1e-4)
        assert str(told["anomalous"]) == row["anomalous"]
        assert Image.open(told["overlay"]).size == Image.open(told["path"]).size


def test_pictures_have_one_fixed_scale(trained, tmp_path, capsys):
    """An image is not scaled by itself: below a huge threshold it stays clear, above a tiny one it
    is all hot. The image has an alpha channel."""
    Image.fromarray(np.dstack([COLOURS, GREY])).save(tmp_path / "image.png")
    checkpoint = torch.load(trained[cada].checkpoint, weights_only=True)
    for threshold, clear in ((1e9, True), (1e-9, False)):
        checkpoint["thresholds"]["cada"] = threshold
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        assert run(cada, "predict", tmp_path / "image.png", "--out", tmp_path) == 0
        told = predictions(capsys)[0]
        picture = Image.open(told["overlay"]).convert("RGB")
        assert np.array_equal(picture, COLOURS) == clear
        assert told["anomalous"] != clear


@FORKS
def test_predict_goes_on_after_a_broken_file(data, trained, tmp_path, capsys):
    """Each is told of, and all others are scored. Links are followed, a long name is cut, and what
    it has written itself is not scored again."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "000.png").write_text("no image")
    shutil.copy(data / "a/test/good/000.png", folder / f"{'x' * 240}.png")
    (folder / "link").symlink_to(data / "a/test/hole")
    words = ["predict", folder, "--checkpoint", trained[cada].checkpoint, "--out", folder]
    for _ in range(2):
        assert run(cada, *words) == 2
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == 4
        assert f"cannot read image {folder / '000.png'}" in printed.err
        assert "1 of 5 images not scored" in printed.err.splitlines()[-1]


@BOTH
def test_neither_cache_nor_class_names_change_a_score(script, tree, trained, tmp_path):
    """And one seed gives one result, since the run that this is compared with was another one.
    (To the last bit, because the 16 training images fill their batches of 4: a batch of another
    size may be rounded differently.)"""
    (tree / "a").rename(tree / "screws")
    (tree / "b").rename(tree / "washers")
    out = tmp_path / "out"
    assert run(script, "--data", tree, "--out", out, *FLAGS[script], "--no-cache") == 0
    assert {row["class"] for row in scores_of(out)} == {"screws", "washers"}
    np.testing.assert_array_equal(as_numbers(out, script), as_numbers(trained[script].out, script))


def die_after_the_first_checkpoint(script, words: list[str]) -> None:
    """Run a command line, and kill this process as soon as a checkpoint is written."""
    save = script.save_checkpoint

    def save_and_die(detector, checkpoint):
        save(detector, checkpoint)
        os.kill(os.getpid(), signal.SIGKILL)

    script.save_checkpoint = save_and_die
    script.main(words)


@FORKS
@BOTH
def test_a_killed_run_goes_on(script, data, trained, tmp_path, capsys):
    """It ends as if nothing had happened, and the kill leaves no cache behind."""
    words = ["--data", str(data), "--out", str(tmp_path), *FLAGS[script]]
    job = multiprocessing.get_context("fork").Process(
        target=die_after_the_first_checkpoint, args=(script, words))
    job.start()
    job.join(100)
    assert job.exitcode == -signal.SIGKILL
    assert files_in(tmp_path) == {"checkpoint.pt"}
    assert run(script, "eval", "--out", tmp_path) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(script, "--resume", "--out", tmp_path) == 0
    assert results_of(tmp_path) == results_of(trained[script].out)
    assert scores_of(tmp_path) == scores_of(trained[script].out)


def test_any_flag_overrides_the_checkpoint(trained, data, tmp_path):
    """--resume with more --iters trains on; --data leads eval to another set."""
    words = ["--checkpoint", trained[cada].checkpoint, "--out", tmp_path]
    assert run(cada, "--resume", *words, "--iters", 3, "--data", data / "a") == 0
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == checkpoint["config"]["iters"] == 3
    assert checkpoint["config"]["image_size"] == 64
    assert len(scores_of(tmp_path)) == 6
    assert run(cada, "eval", "--out", tmp_path, "--data", data / "b") == 0
    assert {row["class"] for row in scores_of(tmp_path)} == {"b"}


def test_control_c_ends_in_one_line(data, tmp_path, monkeypatch, capsys):
    """Ctrl-C is no crash: the exit code is 130, as in a shell. The checkpoint of an earlier run is
    gone by then, so that nobody resumes that one by mistake."""
    (tmp_path / "checkpoint.pt").write_text("of an earlier training")
    def press(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cada.RevDist, "forward", press)
    assert run(cada, "--data", data, "--out", tmp_path, *FLAGS[cada]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("cada.py: error: interrupted")
    assert not files_in(tmp_path)


def test_threshold_comes_from_images_kept_back(data, trained):
    """Of four images it is the largest score. With --holdout 0 all images serve for both."""
    checkpoint = torch.load(trained[cada].checkpoint, weights_only=True)
    cfg = cada.Config(**checkpoint["config"])
    normal, _ = cada.read_dataset(data)
    kept, held = cada.hold_out(cfg, normal)
    assert len(held) == 4
    assert len(kept) == 16
    assert set(kept + held) == set(normal)
    variants = cada.aligned_maps(cada.build(cfg, checkpoint), held, checkpoint)
    highest = cada.image_score(variants["cada"]()).max().item()
    assert checkpoint["thresholds"]["cada"] == pytest.approx(highest, rel=1e-4)
    cfg.holdout = 0.0
    assert cada.hold_out(cfg, normal) == (normal, normal)


@pytest.mark.parametrize("n, quantile", [(30, 0.9), (7, 0.75)])
def test_threshold_lets_the_promised_share_pass(n, quantile):
    """Over many draws, a new normal score lies above the threshold of n others in at most a share
    of 1 - quantile."""
    scores = torch.rand(2000, n + 1, generator=torch.Generator().manual_seed(0))
    above = [row[-1].item() > cada.conformal_threshold(row[:-1], quantile) for row in scores]
    assert 0.8 * (1 - quantile) < np.mean(above) < 1.1 * (1 - quantile)


@BOTH
def test_good_images_and_a_teacher_from_a_file(script, good, tmp_path, monkeypatch, capsys):
    """Good images are enough to train and predict; what an earlier training left goes. A teacher's
    weights are read from their file each time; the checkpoint knows their hash."""
    weights = tmp_path / "weights.pt"
    torch.manual_seed(5)
    model = torchvision.models.resnet18() if script is cada else cnc.tiny_clip(64)
    torch.save(model.state_dict(), weights)
    teacher = small_detector(script, weights=str(weights)).teacher
    used = teacher.stem[0] if script is cada else teacher.clip.visual.conv1
    in_file = model.conv1 if script is cada else model.visual.conv1
    assert torch.equal(used.weight, in_file.weight)

    # Paths are given from one folder and used from another.
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "scores.csv").write_text("of an earlier training")
    words = ["--data", "tree", "--out", out, *FLAGS[script], "--weights", "weights.pt"]
    assert run(script, *words) == 0
    printed = capsys.readouterr()
    assert "nothing to evaluate" in printed.out
    assert "RANDOM" not in printed.err
    assert files_in(out) == {"checkpoint.pt"}
    stored = torch.load(out / "checkpoint.pt", weights_only=True)["weights"]["teacher"]
    assert isinstance(stored, str)  # a hash
    monkeypatch.chdir(out)
    words = ["predict", good / "a/train/good/000.png", "--out", out]
    assert run(script, *words) == 0
    assert predictions(capsys)[0]["threshold"] > 0

    # Another network in the file is noticed, and so is no file. The file may have moved.
    weights.rename(tmp_path / "moved.pt")
    for _ in ("nothing", "another network"):
        assert run(script, *words) == 2
        assert "--weights" in capsys.readouterr().err
        model = torchvision.models.resnet18() if script is cada else cnc.tiny_clip(64)
        torch.save(model.state_dict(), weights)
    assert run(script, *words, "--weights", tmp_path / "moved.pt") == 0


def test_data_may_lack_masks_or_good_images(tree, trained, tmp_path):
    """Without masks there are the metrics of images; with one kind of image only there are none."""
    words = ["eval", "--checkpoint", trained[cada].checkpoint, "--data", tree, "--out", tmp_path]
    shutil.rmtree(tree / "a/ground_truth")
    shutil.rmtree(tree / "b/ground_truth")
    assert run(cada, *words) == 0
    found = results_of(tmp_path)["cada"]["pooled"]
    assert list(found) == ["I-AUROC", "I-AP", "I-F1max"]
    assert found.items() <= results_of(trained[cada].out)["cada"]["pooled"].items()
    for folder in ("a/train", "b/train", "a/test/good", "b/test/good"):
        shutil.rmtree(tree / folder)
    assert run(cada, *words) == 0
    assert results_of(tmp_path)["cada"]["pooled"] == {}


@BOTH
def test_nonsense_is_not_reported(script, data, trained, tmp_path, capsys):
    """Where a map is not finite, neither eval nor predict has an answer; the image is named. A
    checkpoint that lacks a layer does not fit."""
    checkpoint = torch.load(trained[script].checkpoint, weights_only=True)
    student = checkpoint["weights"]["student"]
    last = [name for name in student if name.endswith("weight")][-1]
    kept = student.pop(last)
    path = tmp_path / "checkpoint.pt"
    torch.save(checkpoint, path)
    assert run(script, "eval", "--out", tmp_path) == 2
    assert "student does not fit" in capsys.readouterr().err
    student[last] = kept * math.nan
    torch.save(checkpoint, path)
    for words in (["eval"], ["predict", data / "a/test/good/000.png"]):
        assert run(script, *words, "--out", tmp_path) == 2
        printed = capsys.readouterr()
        assert not printed.out
        assert "a/test/good/000.png: its anomaly map is not finite" in printed.err


def test_of_torchruns_processes_one_evaluates(trained, tmp_path, monkeypatch, capsys):
    """The others have nothing to do."""
    monkeypatch.setattr(cada, "RANK", 1)
    words = ["eval", "--checkpoint", trained[cada].checkpoint, "--out", tmp_path]
    assert run(cada, *words) == 0
    assert not capsys.readouterr().out
    assert not files_in(tmp_path)


def test_what_holdout_costs_is_told(capsys):
    """It may take all images of a class; and of few images there is no 0.99 quantile."""
    samples = [cada.Sample(Path(str(i)), f"class {i}") for i in range(10)]
    cada.hold_out(cada.Config(), samples)
    told = capsys.readouterr().err
    assert re.search(r"keeps back all training images of class \d\n", told)
    assert "of 1 normal images; for at most 1 % of false alarms it takes 99" in told
    scores = torch.arange(99.0)
    assert cada.conformal_threshold(scores) == cada.conformal_threshold(scores[:98]) + 1 == 98
    cada.hold_out(cada.Config(), samples * 99)
    assert not capsys.readouterr().err


@FORKS
def test_names_may_be_strange(tree, trained, tmp_path):
    """A $ in a class name is drawn as text, not as a formula. A file name that is no UTF-8 is
    written back as it was. Of an unknown class there is no oracle."""
    (tree / "a").rename(tree / r"$\cost_$")
    name = b"caf\xe9.png"
    (tree / r"$\cost_$/test/good/000.png").rename(tree / r"$\cost_$/test/good" / os.fsdecode(name))
    words = ["--checkpoint", trained[cada].checkpoint, "--data", tree, "--out", tmp_path / "out"]
    assert run(cada, "eval", *words) == 0
    assert name in (tmp_path / "out/scores.csv").read_bytes()
    assert list(results_of(tmp_path / "out")) == ["raw", "regress", "cada"]


def test_pictures_show_twelve_classes(data, tmp_path):
    """What is beyond the twelfth class changes nothing in them."""
    image = data / "a/test/good/000.png"
    samples = [cada.Sample(image, f"class {i:02}") for i in range(14)]
    bad = [cada.Sample(image, f"class {i:02}", 1) for i in range(14)]
    scores = {"raw": np.arange(14)}
    maps = []
    levels = []
    for count in (14, 12, 11):
        cada.plot_heatmaps(tmp_path / "maps.png", samples[:count] + bad[:count],
                           np.zeros(28), {}, {})
        maps.append((tmp_path / "maps.png").read_bytes())
        some = {"raw": scores["raw"][:count]}
        cada.plot_distributions(tmp_path / "levels.png", samples[:count], some,
                                {"raw": {"pooled": {}}}, {"raw": 9})
        levels.append((tmp_path / "levels.png").read_bytes())
    for pictures in (maps, levels):
        assert pictures[0] == pictures[1] != pictures[2]


def test_cada_on_cnc(data, trained, tmp_path, monkeypatch, capsys):
    """CADA is fitted to a CNC that is trained already and stays as it is, or to a new one; and
    eval, predict and --resume work."""
    monkeypatch.chdir(tmp_path)  # for runs/cada, the default of --out
    before = trained[cnc].checkpoint.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(cnc.CNC, "forward", None)  # it must not train
        assert run(cada, "--base", "cnc", "--checkpoint", trained[cnc].checkpoint) == 0
    assert trained[cnc].checkpoint.read_bytes() == before
    scores = scores_of(Path("runs/cada"))
    assert [row["raw"] for row in scores] == [row["cnc"] for row in scores_of(trained[cnc].out)]

    words = ["--base", "cnc", "--out", "new"]
    for first in (["--data", data, *FLAGS[cnc]], ["eval"], ["--resume"]):
        assert run(cada, *first, *words) == 0
        assert scores_of(Path("new")) == scores
    capsys.readouterr()
    assert run(cada, "predict", data / "a/test/hole/000.png", *words) == 0
    assert predictions(capsys)[0]["score"] == pytest.approx(float(scores[3]["cada"]), abs=1e-3)


def train_a_share(script, words: list[str], rank: int, count: int) -> None:
    """What one of torchrun's `count` processes does. Left out is all in which a half of the images
    differs from all of them: BatchNorm, dropout, the mean margin and the balance of experts."""
    script.RANK = rank
    script.WORLD_SIZE = count
    os.environ["RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(count)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(29500 + os.getppid() % 1000)
    torch.nn.BatchNorm2d.forward = lambda self, x: F.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias)
    torch.nn.Dropout.forward = lambda self, x: x
    cnc.NormalMargins.update = lambda self, margin: None
    cnc.CNC.BALANCE_WEIGHT = 0
    # A step of Adam does not tell the size of a gradient, one of SGD does.
    torch.optim.Adam = lambda parameters, *args, **more: torch.optim.SGD(parameters, 1.0)
    torch.optim.AdamW = torch.optim.Adam
    sys.exit(script.main(words))


@FORKS
@BOTH
def test_two_processes_learn_what_one_does(script, good, tmp_path):
    """Each sees a half of every batch, here of all 20 images, and both follow the mean of their
    gradients."""
    fork = multiprocessing.get_context("fork")
    words = ["--data", str(good), *FLAGS[script], "--batch-size", "20", "--holdout", "0"]
    if script is cnc:
        words += ["--no-fnp", "--tau", "1"]
    students = [small_detector(script).student.state_dict()]
    for count in (1, 2):
        out = tmp_path / str(count)
        jobs = []
        for rank in range(count):
            arguments = (script, [*words, "--out", str(out)], rank, count)
            jobs.append(fork.Process(target=train_a_share, args=arguments))
            jobs[-1].start()
        for job in jobs:
            job.join(100)
            assert job.exitcode == 0
        checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
        students.append(checkpoint["weights"]["student"])

    moved = []
    difference = []
    for start, one, two in zip(*(student.values() for student in students)):
        moved.append((one - start).flatten())
        difference.append((two - one).flatten())
    assert torch.cat(difference).norm() < 1e-3 * torch.cat(moved).norm()


# ==== what the README says ========================================================================
README = (HERE / "README.md").read_text(encoding="utf-8")
SOURCES = [(HERE / name).read_text(encoding="utf-8") for name in ("cada.py", "cnc.py")]


def test_readme_lists_every_departure():
    """The rows of its tables and the tags [ours] Dn in the code name the same set."""
    tags = re.findall(r"\[ours\](?:\s+(D\d+))?", SOURCES[0] + SOURCES[1])
    rows = re.findall(r"^\|\s*(D\d+)\s*\|", README, re.M)
    assert set(rows) == set(tags) - {""}
    # Each docstring explains the tag itself once.
    assert tags.count("") == 2


def test_links_of_the_readme_lead_to_files():
    """Links to files of the repository lead somewhere."""
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (HERE / link).exists(), link


def test_every_command_of_the_readme_runs(data, tmp_path, monkeypatch, capsys):
    """Flags after those of the README, which go before them, make it small; so does the data."""
    for name in ("mvtec", "mine"):
        shutil.copytree(data / "b", tmp_path / "data" / name / "bottle")
    shutil.copytree(data / "b/test/good", tmp_path / "folder")
    Image.fromarray(COLOURS).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)

    commands = re.findall(r"^ *python (cada|cnc)\.py (.+)$", README, re.M)
    assert len(commands) >= 6
    for name, text in commands:
        script = cada if name == "cada" else cnc
        words = shlex.split(text, comments=True)
        if "--checkpoint" not in words and "--resume" not in words:
            words += FLAGS[cnc if "cnc" in words else script]
        assert run(script, *words) == 0, text
    assert "overlay" in capsys.readouterr().out


def test_the_readmes_own_detector_is_aligned(tmp_path, monkeypatch):
    """Its block of Python runs, word for word, and CADA helps there; on a part of the demo set."""
    odd = shutil.ignore_patterns("*[13579]*")
    shutil.copytree(DEMO, tmp_path / "data/demo", ignore=odd)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(README.split("```python\n")[1].split("```")[0], names)
    labels = [s.label for s in names["test"]]
    maps = names["maps"]
    aligned = cada.normalise(maps, *names["cada"].predict(names["features"]))
    raw_score = cada.image_score(cada.smooth(maps))
    assert auroc(cada.image_score(cada.smooth(aligned)), labels) > auroc(raw_score, labels) + 0.05


def test_scripts_share_sections_letter_for_letter():
    """What both scripts need stands in both, since each is to be read on its own."""
    banner = re.compile(r"^# ==== shared: (.+?)\n(.*?)^# ==== end shared$", re.M | re.S)
    ours, theirs = (banner.findall(source) for source in SOURCES)
    assert len(ours) == SOURCES[0].count("==== end shared") >= 6
    for one, other in zip(ours, theirs, strict=True):
        assert one == other, one[0]
    assert "import cada" not in SOURCES[1]


# ==== bad input ===================================================================================
def check_failure(script, words: list, says: str, capsys, tmp_path) -> None:
    """The run ends with exit code 2 and a message that says something, and leaves no result.
    Our own message is one line, and the last."""
    out = tmp_path / "out"
    assert run(script, *words, "--out", out) == 2
    error = capsys.readouterr().err
    if "error: " in error:
        assert says in error.splitlines()[-1]
        assert error.splitlines()[-1].startswith(f"{script.__name__}.py: error: ")
    else:
        assert says in error  # tyro's frame
    assert files_in(out) <= {"checkpoint.pt"}  # of the first steps, if there were any


BAD_COMMAND_LINES = [  # (script, command line, what the message must say)
    (cada, "--itres 3", "--iters"),
    (cada, "--iters ten", "--iters"),
    (cada, "explain", "'explain'"),
    (cada, "train {data}", "name images after predict"),
    (cada, "predict", "name images after predict"),
    (cada, "--loss mse", "--loss"),
    (cada, "--base unet", "--base"),
    (cada, "--base cnc --iters 3", "--iters"),
    (cada, "--seed -1", "--seed"),
    (cada, "--seed 1760000000000", "--seed"),
    (cada, "--batch-size 0", "--batch-size"),
    (cada, "--iters 0", "--iters"),
    (cada, "--image-size 32", "--image-size"),
    (cada, "--image-size 100", "--image-size"),
    (cada, "--holdout 1", "--holdout"),
    (cada, "eval", "train first"),
    (cada, "--checkpoint nowhere.pt", "nowhere.pt"),
    (cada, "eval --checkpoint {malicious}", "malicious.pt"),
    (cada, "eval --checkpoint {cnc}", "--base"),
    (cada, "eval --base cnc --checkpoint {cnc}", "no CADA"),
    (cada, "eval --teacher resnet34 --checkpoint {cada}", "does not fit"),
    (cada, "predict nowhere.png --checkpoint {cada}", "nowhere.png"),
    (cada, "predict {empty} --checkpoint {cada}", "no images"),
    (cada, "{train} --data nowhere", "nowhere: no such folder"),
    (cada, "{train} --device abacus", "--device"),
    (cada, "eval --data {empty} --checkpoint {cada}", "no test images"),
    (cada, "{train} --teacher vgg16", "--teacher vgg16"),
    (cada, "{train} --weights IMAGENET1K_V9", "--weights IMAGENET1K_V9"),
    (cada, "{train} --weights {malicious}", "malicious.pt"),
    (cada, "{train} --lr 1e30", "lower --lr"),
    (cnc, "--top-k 6", "--top-k"),
    (cnc, "eval --no-moe --checkpoint {cnc}", "does not fit"),
    (cnc, "{train} --taps 7", "--taps"),
    (cnc, "{train} --taps 4 2", "rising"),
    (cnc, "{train} --image-size 70", "multiples of 16"),
    (cnc, "{train} --weights openai", "--weights openai"),
    (cnc, "{train} --weights {malicious}", "malicious.pt"),
    (cnc, "{train} --weights {other}", "other.pt"),
    (cnc, "{train} --teacher RN50", "plain ViT"),
    (cnc, "{train} --teacher ViT-B-16-SigLIP --image-size 224", "SigLIP"),
    (cnc, "{train} --lr 1e30", "lower --lr"),
]


class Payload:
    """Who unpickles it creates a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("script, text, says", BAD_COMMAND_LINES)
def test_bad_command_lines(script, text, says, data, trained, tmp_path, on_meta, capsys):
    """A malicious checkpoint is one that would run code if it were unpickled."""
    ran = tmp_path / "ran"
    malicious = tmp_path / "malicious.pt"
    malicious.write_bytes(pickle.dumps({"config": Payload(ran)}, protocol=2))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "empty").mkdir()
    places = {"data": data, "empty": tmp_path / "empty", "malicious": malicious,
              "other": tmp_path / "other.pt", "cada": trained[cada].checkpoint,
              "cnc": trained[cnc].checkpoint,
              "train": " ".join(["--data", str(data), *FLAGS[script]])}
    check_failure(script, text.format(**places).split(), says, capsys, tmp_path)
    assert not ran.exists()
    pickle.loads(malicious.read_bytes())
    assert ran.exists()  # so the payload works


BAD_DATA = [  # (what is done to the data set, what the message must say)
    ("rm a/train/good/*", "a/train/good"),
    ("rm ?/train/good/00[1-9].png", "2 training images"),
    ("echo text > a/train/good/003.png", "good/003.png"),
    ("truncate --size 600 a/test/hole/001.png", "hole/001.png"),
    ("rm a/ground_truth/hole/001_mask.png", "ground_truth/hole for 001.png"),
    ("mv a/ground_truth/hole a/ground_truth/hoel", "ground_truth/hole for 000.png"),
    ("echo text > a/ground_truth/hole/001_mask.png", "hole/001_mask.png"),
    ("cp b/test/good/000.png a/ground_truth/hole/001_mask.png", "001_mask.png: its image has"),
    ("cp turned.png a/test/hole/001.png", "EXIF"),
    ("cp dark.png a/test/good/001.png", "good/001.png: its values must lie"),
    ("cp a/ground_truth/hole/000_mask.png a/test/hole", "test/hole/000_mask.png shares its name"),
    ("cp a/test/hole/000.png a/test/hole/000.jpg", "test/hole/000.png shares its name"),
    ("cp black.png a/ground_truth/hole/000.png", "hole/000_mask.png shares its name"),
    ("rm -r b/*t*; for i in a/ground_truth/hole/*; do cp black.png $i; done", "a/ground_truth"),
    ("for i in a b; do mv $i/test $i/test_public; mv $i/ground_truth $i/test_public; done",
     "a/test_public/ground_truth"),
]


@pytest.mark.parametrize("spoil, says", BAD_DATA)
def test_bad_data(spoil, says, tree, tmp_path, capsys):
    """A broken data set stops the run before the training; the message names the file."""
    Image.new("RGB", (64, 64), "grey").save(tree / "turned.png", exif=TURNED)
    Image.fromarray(np.full((64, 64), 4095, np.uint16)).save(tree / "dark.png")
    Image.new("L", (64, 64)).save(tree / "black.png")
    subprocess.run(spoil, shell=True, check=True, cwd=tree)
    check_failure(cada, ["--data", tree, *FLAGS[cada]], says, capsys, tmp_path)


@FORKS
@BOTH
@pytest.mark.parametrize("flag, says", [("--cache", "--no-cache"), ("--no-cache", "no checkpoint")])
def test_a_full_disk(script, flag, says, data, tmp_path, capsys):
    """Here no file may be larger than 100 kB. The message names what had no room, and the way
    without it; no part of a file is left."""
    import resource  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        check_failure(script, ["--data", data, *FLAGS[script], flag], says, capsys, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not files_in(tmp_path / "out")


@FORKS
@BOTH
def test_a_worker_finds_a_mistake(script, good, tmp_path, monkeypatch, capsys):
    """A file that breaks during the training ends in one line, as anywhere. A worker sends bytes,
    so that a batch is small."""
    sample = script.Sample(good / "a/train/good/003.png")
    assert script.load_batch(small_detector(script).preprocess, [sample]).dtype == torch.uint8
    sample.path.write_text("no image")
    monkeypatch.setattr(script, "check_files", lambda sample: 0.0)
    words = ["--data", good, *FLAGS[script], "--workers", 2]
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    check_failure(script, words, "error: cannot read image", capsys, tmp_path)
    gc.collect()  # the workers end here, and need no more than that interval


def test_a_script_on_its_own(tmp_path, monkeypatch, capsys):
    """Neither the demo set nor the other script lies beside it."""
    monkeypatch.setattr(cada, "HERE", tmp_path)
    check_failure(cada, [], "data/demo: no such folder", capsys, tmp_path)
    check_failure(cada, ["--base", "cnc"], "cnc.py does not lie beside", capsys, tmp_path)


@BOTH
def test_no_network(script, data, tmp_path, monkeypatch, capsys):
    """The message names the weights and the way without them."""
    def download(*args, **more):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # what was downloaded before must not help
    monkeypatch.setattr(torch.hub, "urlopen", download)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    words = ["--data", data, *FLAGS[script], "--weights", "IMAGENET1K_V1"]
    if script is cnc:
        words += ["--weights", "openai", "--teacher", "ViT-B-32-quickgelu", "--image-size", 224]
    check_failure(script, words, "Name or service not known", capsys, tmp_path)


# ==== benchmark: python test_smoke.py bench =======================================================
def seconds(work) -> float:
    """Median time of five calls of a function, after a first one that warms up."""
    work()
    found = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return float(np.median(found))


def bench_training(script, folder: Path, batch_size: int, **settings) -> None:
    """How much longer does a training step take without the cache?"""
    cfg = script.Config(weights="none", workers=0, out=str(folder), batch_size=batch_size,
                        **settings)
    detector = script.build(cfg, None).train()
    samples = []
    for i in range(2 * batch_size):
        draw(folder / f"{i}.png", i, size=(256, 256))
        samples.append(script.Sample(folder / f"{i}.png"))
    learners = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learners, 1e-3, fused=True)

    sources = {}
    took = {True: [], False: []}
    for cfg.cache in took:  # the first batch fills the cache
        batches = script.shuffled(len(samples), batch_size, 7, seed=0)
        sources[cfg.cache] = script.teacher_features(detector, samples, batches)
        next(sources[cfg.cache])
    for _ in range(6):  # in turn, so that noise of the machine hits both
        for cached in took:
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            detector(next(sources[cached])).backward()
            optimizer.step()
            took[cached].append(time.perf_counter() - began)
    ratio = np.median(took[False]) / np.median(took[True])
    print(f"{cfg.teacher}: a step with --no-cache takes {ratio:.2f} times as long")


PEAK = r"""
import re, cada, numpy as np
peak = lambda: int(re.search("VmHWM: *\t(.*) kB", open("/proc/self/status").read())[1])
masks = np.zeros((200, 256, 256), bool)
masks[::2, 100:172, 90:218] = True  # 7 % of all pixels
maps = np.random.default_rng(0).random(masks.shape, np.float32)
before = peak()
cada.ranking_metrics("P", maps, masks)
print(f"pixel metrics: {1024 * (peak() - before) / maps.size:.1f} bytes a pixel at the peak")
"""


def bench_metrics() -> None:
    """80 maps of 256 x 256, half of them with defects, against scikit-learn; and the memory."""
    masks = np.zeros((80, 256, 256), bool)
    masks[::2, 10:50, 60:90] = True
    masks[::4, 200:220, 20:40] = True
    maps = cada.smooth(torch.rand(80, 256, 256)).numpy() + 0.05 * masks
    labels = masks.ravel()
    scores = maps.ravel()
    ours = seconds(lambda: cada.ranking_metrics("P", maps, masks))
    theirs = seconds(lambda: roc_auc_score(labels, scores))
    theirs += seconds(lambda: average_precision_score(labels, scores))
    print(f"scikit-learn's pixel AUROC and AP take {theirs / ours:.1f} times as long as all ours")
    subprocess.run([sys.executable, "-c", PEAK], cwd=HERE)


def moved_tokens(detector, samples: list, shift: torch.Tensor | float) -> list[torch.Tensor]:
    """Tokens of a teacher that understands "damaged": in joint space each patch moves along
    t_a - t_n, by noise of 0.06 of its length and by `shift` (B, N)."""
    t_n, t_a = detector.prompts.start[0]
    along = F.normalize(t_a - t_n, dim=0) @ detector.teacher.clip.visual.proj.T
    generator = torch.Generator().manual_seed(0)
    moved = []
    images = torch.cat([*cnc.image_batches(detector, samples)])
    for tap in detector.teacher(images):
        patches = tap[:, 1:].float()
        share = 0.06 * torch.randn(patches.shape[:2], generator=generator) + shift
        patches += (share * patches.norm(dim=-1))[..., None] * along
        moved.append(torch.cat([tap[:, :1], patches.half()], dim=1))
    return moved


def bench_text() -> None:
    """What is a text worth that means something? A trained CLIP was not run. The tiny teacher is
    made to understand on a part of the demo set: patches of which a defect covers a tenth move by
    0.12 of their length."""
    normal, test = cnc.read_dataset(DEMO)
    normal = normal[::2]
    test = test[::2]
    masks = cnc.load_masks(test, 64)
    covered = F.avg_pool2d(torch.from_numpy(masks).float()[:, None], 16).flatten(1)
    for text in (True, False):
        detector = small_detector(cnc, fnp=text, constraint=text)
        detector.teacher.estimate_statistics(cnc.image_batches(detector, normal))
        tokens = moved_tokens(detector, normal, 0)
        learners = [p for p in detector.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learners, 1e-3)
        detector.train()
        for step, rows in enumerate(cnc.shuffled(len(normal), 8, 160, seed=0)):
            loss = detector([t[rows] for t in tokens], warm_up=step < 20)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        tokens = moved_tokens(detector, test, 0.12 * (covered > 0.1))
        with torch.no_grad():
            maps = cnc.smooth(detector.eval().describe(tokens)[1])
        found = cnc.ranking_metrics("P", maps.numpy(), masks)
        print(f"text {text}: P-AUROC {found['P-AUROC']:.1%}, P-AP {found['P-AP']:.1%}")


if __name__ == "__main__":
    if sys.argv[1:] != ["bench"]:
        sys.exit("pytest -q test_smoke.py runs the tests; python test_smoke.py bench the benchmark")
    bench_text()
    torch.set_num_threads(os.cpu_count())
    print(f"{os.cpu_count()} CPU cores, PyTorch {torch.__version__}")
    with TemporaryDirectory() as temporary:
        bench_training(cnc, Path(temporary), 8, teacher="ViT-B-16", image_size=224)
        bench_training(cada, Path(temporary), 4, teacher="wide_resnet50_2")
    bench_metrics()
