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
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch.testing import assert_close

import cada
import cnc

HERE = Path(__file__).resolve().parent
DEMO = HERE / "data/demo"
BOTH = pytest.mark.parametrize("script", [cada, cnc], ids=["cada", "cnc"])
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
torch.set_num_threads(1)  # the tensors are so small that a second thread costs more than it gains

# What makes a run small: two steps of RevDist; eight of CNC, of which four are warm-up.
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


def small_config(script, **settings):
    """Settings of a small detector with random weights."""
    teacher = "resnet18" if script is cada else "tiny"
    small = {"teacher": teacher, "weights": "none", "image_size": 64, "device": "cpu", "workers": 0}
    return script.Config(**small | settings)


def small_detector(script, **settings):
    """A detector with its random weights, in eval mode."""
    return script.build(small_config(script, **settings), None).eval()


def random_images(count: int) -> torch.Tensor:
    """Noise in the place of preprocessed images, always the same."""
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# ==== the ideas: CNC ==============================================================================
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_mixture_is_the_sum_over_chosen_experts(top_k):
    """Token by token: the highest scores choose, and their softmax weighs the experts' answers."""
    torch.manual_seed(0)
    moe = cnc.GatedMoE(8, 5, top_k)
    x = torch.randn(2, 30, 8)
    y, _ = moe(x)
    for token, answer in zip(x.flatten(0, 1), y.flatten(0, 1)):
        scores, chosen = moe.gate(token).topk(top_k)
        weights = scores.softmax(0)
        expected = sum(w * moe.experts[k](token) for w, k in zip(weights, chosen))
        assert_close(answer, expected, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("slack", [0.0, 2.0])
@pytest.mark.parametrize("tau", [0.001, 0.07, 1.0])
def test_constraint_is_a_cross_entropy(tau, slack):
    """The constraint is the softmax cross entropy of cosines, in which the normal text is right,
    once the usual margin is taken off; at tau = 0.001 it is nearly a hinge of the margin."""
    detector = small_detector(cnc, tau=tau)
    v = F.normalize(torch.randn(3, 2, 16, 192), dim=-1)  # (taps, B, N, D)
    text = F.normalize(torch.randn(3, 2, 192), dim=-1)  # (taps, 2, D): t_n and t_a
    detector.margins.update(cnc.margin(v, text))
    found = detector.constraint(v, text, slack).item()

    cosines = torch.einsum("lbnd,lkd->lbnk", v.double(), text.double())
    margin = cosines[..., 0] - cosines[..., 1]
    std, mean = torch.std_mean(margin, dim=(1, 2), correction=0, keepdim=True)
    cosines[..., 0] -= mean - slack * std
    logits = cosines.flatten(0, 2) / tau
    normal = torch.zeros(len(logits), dtype=torch.long)
    assert found == pytest.approx(tau * F.cross_entropy(logits, normal).item(), abs=1e-6)
    if tau == 0.001:
        hinge = F.relu(mean - slack * std - margin).mean()
        assert found == pytest.approx(hinge.item(), rel=0.05)


def test_promotion_draws_normal_patches_together():
    """psi, in 0..1, grows with the margin and is a half for the average patch. The more normal a
    patch, the nearer the decoded one is moved to it."""
    detector = small_detector(cnc)
    t_n, t_a, content, mistake = torch.eye(192)[:4]
    text = torch.stack([t_n, t_a]).expand(3, 2, 192)  # the same for each tap
    share = torch.linspace(0, 1, 5)[:, None]  # of five patches, more and more normal
    e = F.normalize(content + share * t_n + (1 - share) * t_a, dim=-1).expand(3, 1, 5, 192)
    d = F.normalize(e + 0.3 * mistake, dim=-1)
    detector.margins.update(cnc.margin(e, text))

    psi = detector.psi(e, text)
    assert (psi.diff() > 0).all()
    assert 0 < psi.min() and psi.max() < 1
    assert_close(psi[..., 2], torch.full((3, 1), 0.5))
    gain = 1 - F.cosine_similarity(e, d, dim=-1) - detector.distance(e, d, text)
    assert (gain.diff() > 0).all()


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
    maps = rng.normal(size=masks.shape) + (9 if case == "perfect" else 1.5) * masks
    if case == "ties":
        maps = maps.round()

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

    def mean_of_classes(scores):
        return np.mean([auroc(*part) for part in zip(scores.split(40), labels.split(40))])

    assert mean_of_classes(aligned) > mean_of_classes(raw) - 0.03


@pytest.mark.parametrize("features, maps", [
    (torch.randn(10, 64), torch.rand(10, 8, 8)),
    (torch.ones(20, 64), torch.rand(20, 8, 8)),
    (torch.randn(10, 64), torch.zeros(10, 8, 8)),
], ids=["few images", "equal images", "zero maps"])
def test_gamma_is_above_u_for_any_images(features, maps):
    """Alignment divides by gamma - u, so neither few nor degenerate images may make it 0."""
    head = fit(features, maps)
    for scale in (0, 1, 1e3, -1e6):  # images that it has never seen the like of
        u, gamma = head.predict(torch.cat([features, scale * torch.randn(9, 64)]))
        assert u.isfinite().all()
        assert gamma.isfinite().all()
        assert (gamma > u).all()


def test_unseen_predictions_leave_one_image_out():
    """They are what fits on all other images predict, with the penalty that then errs least."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 4))
    y = x @ rng.normal(size=(4, 2)) + rng.normal(size=(12, 2))
    weight, bias, unseen = cada.fit_regression(x, y)
    for column in (0, 1):
        target = y[:, column]
        found = []
        for penalty in cada.PENALTIES:
            left_out = []
            for i in range(12):
                fit_on_others = Ridge(penalty).fit(np.delete(x, i, 0), np.delete(target, i))
                left_out.append(fit_on_others.predict(x[i:i + 1])[0])
            error = np.square(target - left_out).mean()
            found.append((error, penalty, left_out))
        _, penalty, left_out = min(found)
        np.testing.assert_allclose(unseen[:, column], left_out, atol=1e-6)
        whole = Ridge(penalty).fit(x, target)
        np.testing.assert_allclose(x @ weight[:, column] + bias[column], whole.predict(x))


def test_a_constant_channel_has_no_say():
    """A channel that never varied in training may be anything later."""
    features, maps, *_ = five_classes(1, raised=0)
    features[:, 5] = 0.3
    head = fit(features, maps)
    before = head.predict(features)[0]
    features[:, 5] += 0.01
    assert torch.equal(head.predict(features)[0], before)


def test_cada_aligns_each_image_by_itself():
    """The other images of a batch do not matter, and a fit depends on its seed alone; float64
    serves as well."""
    features, maps, *_ = five_classes(1, raised=0)
    head = fit(features, maps)
    u, gamma = head.predict(features)
    assert_close(head.predict(features[3:4]), (u[3:4], gamma[3:4]))
    torch.manual_seed(99)
    np.random.seed(99)
    again = fit(features, maps)
    assert_close(again.predict(features), (u, gamma), rtol=0, atol=0)
    precise = fit(features.double(), maps.double())
    same = (precise.predict(features.double())[0] / u - 1).abs() < 1e-3
    assert same.float().mean() > 0.9  # rounding may move an image to another level


def test_snapping_forgives_small_errors():
    """Features that are a little off move what the regression says of every image by some per cent.
    Snapped, most images keep u, and a level gives all its images the same two numbers."""
    features, maps, *_ = five_classes(1, raised=0)
    head = fit(features, maps)
    off = features + 0.3 * torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    changes = {}
    for method in (head.regress, head.predict):
        ratio = method(off)[0] / method(features)[0]
        changes[method] = ((ratio - 1).abs() > 0.02).float().mean()
    assert changes[head.regress] > 0.5
    assert changes[head.predict] < 0.2
    pairs = torch.stack(head.predict(off), dim=1)
    assert len(pairs.unique(dim=0)) < 50  # of 200 images


# ==== RevDist =====================================================================================
def test_parameters_of_wide_resnet50_2():
    """They are RD's table. Nothing reads layer4 of the teacher, so it is not there."""
    with torch.device("meta"):
        student = cada.Student("wide_resnet50_2")
        teacher = cada.Teacher("wide_resnet50_2", "none", 0)
    expected = {48.26: student.bottleneck, 17.84: student.decode3, 5.32: student.decode2,
                1.76: student.decode1, 83.80: student, 24.86: teacher}
    for millions, module in expected.items():
        assert round(sum(p.numel() for p in module.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("name, c1", [("wide_resnet50_2", 256), ("resnext50_32x4d", 256),
                                      ("resnet18", 64)])
def test_shapes_of_revdist(name, c1):
    """The student answers in the teacher's shapes, also with other kinds of residual blocks."""
    with torch.device("meta"):
        student = cada.Student(name)
        encoded = cada.Teacher(name, "none", 0)(torch.empty(2, 3, 256, 256))
    decoded = student([e.float() for e in encoded])
    shapes = [(2, c1, 64, 64), (2, 2 * c1, 32, 32), (2, 4 * c1, 16, 16)]
    assert [e.shape for e in encoded] == [d.shape for d in decoded] == shapes


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


def test_blur_score_and_scale_of_pictures():
    """The blur has a sigma of 4 at 256 pixels and commutes with the alignment; the score is the
    mean of the highest 1 %; a picture is clear at the mean and hottest at twice the threshold."""
    point = torch.zeros(1, 256, 256)
    point[0, 128, 128] = 1
    offset = torch.arange(256.0) - 128
    variance = cada.smooth(point)[0].sum(0) @ offset.square()
    assert variance == pytest.approx(16, rel=0.01)
    maps = torch.rand(3, 64, 64)
    ends = maps[:, 0, :2].sort().values.unbind(1)  # any u and gamma
    one = cada.smooth(cada.normalise(maps, *ends))
    other = cada.normalise(cada.smooth(maps), *ends)
    assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert cada.image_score(torch.arange(200.0).reshape(1, 10, 20)).tolist() == [198.5]
    shades = cada.heat(torch.tensor([0.0, 0.2, 0.4, 0.6, 9.0]), 0.2, 0.3)
    assert shades.tolist() == pytest.approx([0, 0, 0.5, 1, 1])


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


def test_shapes_of_cnc(on_meta):
    """The student answers in the teacher's shapes. (Without the mixture, whose routing may need
    numbers.)"""
    with torch.device("meta"):
        detector = cnc.CNC(cnc.Config(weights="none", moe=False))  # ViT-L-14-336
        features = detector.teacher(torch.empty(2, 3, 336, 336))
        encoded, decoded, _ = detector.decode(features)
        joined = detector.teacher.joint(encoded[0])
    assert detector.teacher.taps == [8, 16, 24]
    for t in features + encoded + decoded:
        assert t.shape == (2, 1 + 24 ** 2, 1024)
    assert joined.shape == (2, 1 + 24 ** 2, 768)
    assert detector.text().shape == (3, 2, 768)
    kinds = {type(m).__name__ for m in detector.teacher.clip.modules()}
    assert "QuickGELU" in kinds and "GELU" not in kinds


def test_taps_and_joint_space_are_clips():
    """No block after the last tap is run. The CLS token of the last block, projected, is what CLIP
    says of the image."""
    teacher = small_detector(cnc).teacher
    teacher.random = False  # as if it were trained: its tokens are CLIP's own
    teacher.taps = [1, 4, 5]
    outputs = []
    for block in teacher.clip.visual.transformer.resblocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    images = random_images(2)
    found = teacher(images)
    assert len(outputs) == 5
    for tap, number in enumerate(teacher.taps):
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


PLAIN = {"moe": False, "fnp": False, "constraint": False}


def cnc_gradients(tokens, warm_up: bool, **settings) -> tuple:
    """The gradients of the whole loss: the student's as one vector, and the prompts' or None."""
    detector = small_detector(cnc, **settings)
    detector(tokens, warm_up).backward()
    found = [p.grad.flatten() for p in detector.student.parameters() if p.grad is not None]
    return torch.cat(found), detector.prompts.ctx.grad


def test_warm_up_teaches_the_prompts_then_the_decoder(tokens):
    """The constraint has a gradient into the prompts first, whatever the flags are, and into the
    student after it."""
    early, early_prompts = cnc_gradients(tokens, True)
    free, free_prompts = cnc_gradients(tokens, True, constraint=False)
    assert early_prompts.any()
    assert torch.equal(early, free)
    assert torch.equal(early_prompts, free_prompts)
    assert cnc_gradients(tokens, True, **PLAIN)[1].any()
    late, late_prompts = cnc_gradients(tokens, False)
    free, _ = cnc_gradients(tokens, False, constraint=False)
    assert late_prompts is None
    assert (late - free).norm() > 0.01 * late.norm()


def test_cnc_without_its_parts_is_reverse_distillation(tokens):
    """The loss is the mean cosine distance of the patches in joint space."""
    detector = small_detector(cnc, **PLAIN)
    encoded, decoded, _ = detector.decode(tokens)
    e = detector.teacher.joint(torch.stack(encoded))[:, :, 1:]
    d = detector.teacher.joint(torch.stack(decoded))[:, :, 1:]
    distance = 1 - F.cosine_similarity(e, d, dim=-1).mean().item()
    assert detector(tokens).item() == pytest.approx(distance, abs=1e-6)


def test_map_of_cnc_shows_where_the_decoder_fails(tokens):
    """All patches are reproduced but one: the map is highest at its centre and 0 above its
    neighbours."""
    detector = small_detector(cnc, fnp=False)
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
    before = deepcopy(detector.teacher.state_dict())
    learners = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learners, 0.1)
    for _ in range(2):
        detector(detector.teacher(random_images(4))).backward()
        optimizer.step()
    for name, p in detector.student.named_parameters():
        assert p.grad.any(), name
    for name, weights in detector.teacher.state_dict().items():
        assert torch.equal(weights, before[name]), name
    assert not any(p.grad is not None for p in detector.teacher.parameters())


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cache", [True, False])
@BOTH
def test_a_gpu_agrees_with_the_cpu(script, cache, data, trained, tmp_path):
    """It trains three more steps, describes and predicts the same, but for half precision."""
    normal, test = script.read_dataset(data)
    losses = {}
    found = {}
    for device in ("cpu", "cuda"):
        checkpoint = checkpoint_of(trained[script].out)
        more = {"iters": 5} if script is cada else {"epochs": 2.75}
        more |= {"device": device, "cache": cache, "out": str(tmp_path)}
        cfg = script.Config(**checkpoint["config"] | more)
        detector = script.build(cfg, checkpoint)
        for module in detector.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # each device draws for itself
        told = losses[device] = []
        detector.register_forward_hook(lambda module, _, loss, told=told: told.append(loss.item()))
        script.train(cfg, detector, normal[:16], checkpoint)
        _, maps = zip(*script.describe_images(cfg, detector, test))
        found[device] = torch.cat(maps)
    assert len(losses["cpu"]) == 3
    assert_close(losses["cuda"], losses["cpu"], rtol=0.01, atol=0)
    contrast = found["cpu"].max() - found["cpu"].min()
    assert_close(found["cuda"], found["cpu"], rtol=0, atol=0.02 * contrast.item())
    words = ["predict", data / "b/test", "--checkpoint", trained[script].checkpoint]
    assert run(script, *words, "--out", tmp_path, "--device", "cuda") == 0


def test_processes_draw_batches_of_their_own(monkeypatch):
    """In a data set that is sorted by class, a step of eight processes sees about as many classes
    as a step of one does."""
    cfg = cada.Config(batch_size=8)
    classes = np.arange(15).repeat(100)
    seen = {}
    for count in (1, 8):
        monkeypatch.setattr(cada, "WORLD_SIZE", count)
        steps = [set() for _ in range(50)]
        for rank in range(count):
            monkeypatch.setattr(cada, "RANK", rank)
            share = classes[rank::count]
            for step, rows in zip(steps, cada.shuffled_batches(cfg, len(share), 50)):
                step.update(share[rows])
        seen[count] = np.mean([len(step) for step in steps])
    assert seen[8] > 0.9 * seen[1]


# ==== data ========================================================================================
def draw(path: Path, seed: int, grain: float = 6, size: tuple = (64, 64),
         mask: Path | None = None) -> None:
    """Write an image of noise that is blurred by `grain` pixels; with a red hole if it is to have a
    mask, which is written too."""
    width, height = size
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 60, (height, width, 3))
    texture = 128 + (1 + grain) * ndimage.gaussian_filter(noise, (grain, grain, 0))
    image = Image.fromarray(texture.clip(0, 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    if mask:
        x, y = rng.integers(5, 35, 2).tolist()
        hole = (x, y, x + 18, y + 14)
        ImageDraw.Draw(image).ellipse(hole, fill=(250, 20, 20))
        truth = Image.new("L", size)
        ImageDraw.Draw(truth).ellipse(hole, fill=255)
        mask.parent.mkdir(parents=True, exist_ok=True)
        truth.save(mask)
    image.save(path)


@pytest.fixture(scope="session")
def session_path():
    """A folder that is removed at the end, other than pytest's own: checkpoints are large."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path(session_path):
    """The same for a single test."""
    with TemporaryDirectory(dir=session_path) as folder:
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


def spoil(tree: Path, command: str) -> None:
    """Run a shell command in a data set."""
    subprocess.run(command, shell=True, check=True, cwd=tree)


ONLY_TRAINING = "rm -r ?/test ?/ground_truth"

VISA = """object,split,label,image,mask
pcb,train,normal,pcb/Data/Images/Normal/0.JPG,
pcb,test,Normal,pcb/Data/Images/Normal/1.JPG,
pcb,test,anomaly,pcb/Data/Images/Anomaly/0.JPG,pcb/Data/Masks/Anomaly/0.png
pcb,test,anomaly,pcb/Data/Images/Anomaly/1.JPG,pcb/Data/Masks/Anomaly/1.png
"""


@pytest.fixture
def visa(tmp_path) -> Path:
    """A raw VisA tree of one class: a training image, a good and two defective test images. The
    second defect is a single pixel."""
    root = tmp_path / "visa"
    for seed, name in enumerate(["Normal/0.JPG", "Normal/1.JPG", "Anomaly/0.JPG", "Anomaly/1.JPG"]):
        draw(root / "pcb/Data/Images" / name, seed, size=(80, 48))
    values = np.zeros((2, 48, 80), np.uint8)
    values[0, 10:20, 20:60] = 1
    values[0, 20:30, 20:60] = 9
    values[1, 1, 2] = 1
    masks = root / "pcb/Data/Masks/Anomaly"
    masks.mkdir(parents=True)
    for i in range(2):
        Image.fromarray(values[i]).save(masks / f"{i}.png")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text(VISA)
    return root


GREY = np.add.outer(np.arange(0, 120, 3), np.arange(0, 100, 2)).astype(np.uint8)  # (40, 50)
COLOURS = np.dstack([GREY, 255 - GREY, GREY // 2])
PHOTO = Image.fromarray(COLOURS)
DARK = COLOURS // 16  # as if 12 bits were stored in 16, of which the upper 8 are read
TURNED = Image.Exif()
TURNED[0x0112] = 6  # how the camera was held


@pytest.mark.parametrize("name, image, expected", [
    ("grey-16-bit.png", GREY.astype(np.uint16) * 257, np.dstack([GREY] * 3)),
    ("rgba.png", np.dstack([COLOURS, GREY]), COLOURS),
    ("turned.png", np.rot90(COLOURS).copy(), COLOURS),
    ("palette.png", PHOTO.quantize(), COLOURS),
    ("cmyk.JPG", PHOTO.convert("CMYK"), COLOURS),
    ("phone.mpo", PHOTO, COLOURS),
    ("12-of-16-bits.png", GREY.astype(np.uint16) * 16, "nearly black"),
    ("dark.png", DARK, "nearly black"),
    ("dark-rgba.tif", np.dstack([DARK, 255 - GREY]), "nearly black"),
    ("32-bit.tif", GREY.astype(np.int32) * 2**20, "32 bits"),
    ("float.tif", GREY / np.float32(255), "32 bits"),
    ("pages.tif", PHOTO, "has 2 pages"),
    ("frames.gif", PHOTO, "has 2 pages"),
    ("frames.png", PHOTO, "has 2 pages"),
    ("frames.webp", PHOTO, "has 2 pages"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_any_image_is_read_as_rgb(name, image, expected, tmp_path):
    """Sixteen bits, transparency, a turned camera, palettes, CMYK and the two pictures of a phone
    are all understood. Where it is not sure what is white, or which frame is meant, an error asks.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    more = {"exif": TURNED} if name == "turned.png" else {}
    if name.startswith(("pages", "frames", "phone")):
        more = {"save_all": True, "append_images": [image.rotate(180)]}
    path = tmp_path / name
    image.save(path, **more)
    if isinstance(expected, str):
        with pytest.raises(cada.UserError, match=f"{name}.*{expected}"):
            cada.load_image(path)
    else:
        found = cada.load_image(path)
        assert found.mode == "RGB"
        lossy = 0 if name.startswith(("grey", "rgba", "turned")) else 3
        assert np.abs(np.asarray(found) - expected.astype(float)).mean() <= lossy


DISC = np.hypot(*np.mgrid[-20:20, -20:20]) < 9  # the defect
WHITE = DISC.astype(np.uint8) * 255
CLEAR = np.full_like(WHITE, 255)


def palette(numbers: np.ndarray, *colours: int) -> Image.Image:
    """An image of numbers that stand for colours."""
    image = Image.fromarray(numbers.astype(np.uint8), "P")
    image.putpalette(colours)
    return image


HALVES = DISC * np.where(np.arange(40) < 20, 1, 2)  # two regions of numbers 1 and 2


@pytest.mark.parametrize("name, mask", [
    ("numbers.png", Image.fromarray(WHITE // 200)),
    ("16-bit.png", Image.fromarray(WHITE.astype(np.uint16) * 257)),
    ("opaque.png", Image.fromarray(np.dstack([WHITE, CLEAR]))),
    ("drawn-on-nothing.png", Image.fromarray(np.dstack([CLEAR, CLEAR, CLEAR, WHITE]))),
    ("inverted.png", palette(~DISC, 255, 255, 255, 0, 0, 0)),
    ("two-reds.png", palette(HALVES, 0, 0, 0, 64, 0, 0, 128, 0, 0)),
    ("blurred.png", Image.fromarray(ndimage.gaussian_filter(WHITE, 2))),
    ("lossy.jpg", Image.fromarray(WHITE)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_any_mask_is_read_as_black_and_white(name, mask, tmp_path):
    """Numbers, transparency, palettes, blur and JPEG are understood."""
    mask.save(tmp_path / name)
    wrong = np.asarray(cada.load_mask(tmp_path / name)) != DISC
    error = 0.05 if name in ("blurred.png", "lossy.jpg") else 0  # a share of the area
    assert wrong.sum() <= error * DISC.sum()


def test_reads_an_mvtec_tree(tree):
    """Masks are paired by name, hidden files are no images, and one class is a data set too."""
    spoil(tree, "mv a/ground_truth/hole/000_mask.png a/ground_truth/hole/000.png;"
                "mv a/ground_truth/hole/002_mask.png a/ground_truth/hole/0_mask.png;"
                "mv a/test/hole/002.png a/test/hole/0.PNG;"
                "for i in a/*/*; do echo > $i/._001.png; echo > $i/Thumbs.db; done")
    train, test = cada.read_dataset(tree)
    assert [s.cls for s in train] == ["a"] * 10 + ["b"] * 10
    assert [s.label for s in test] == [0, 0, 0, 1, 1, 1] * 2
    assert not any(s.label or s.mask for s in train)
    pairs = [(s.path.name, s.mask.name) for s in test[3:6]]
    assert pairs == [("0.PNG", "0_mask.png"), ("000.png", "000.png"), ("001.png", "001_mask.png")]
    train, test = cada.read_dataset(tree / "b")
    assert {s.cls for s in train + test} == {"b"}


def test_reads_a_raw_visa_tree(visa):
    """A mask is binarised, then resized as its image is. A defect that is lost in this is still
    one by its label."""
    train, test = cada.read_visa(visa)
    assert [s.label for s in train + test] == [0, 0, 1, 1]
    assert test[0].cls == "pcb"
    masks = cada.load_masks(test, 40)
    expected = np.zeros((40, 40), bool)
    expected[8:25, 10:30] = True  # rows 10-29 of 48 and columns 20-59 of 80, whatever their value
    assert np.array_equal(masks[1], expected)
    assert not masks[0].any()
    assert not cada.load_masks(test, 32)[2].any()


@pytest.mark.parametrize("content", [
    b"",
    VISA.encode("utf-16"),
    VISA.encode("utf-8-sig"),
    VISA.replace(",", ";").encode(),
    VISA.replace("train", "training").encode(),
    VISA.encode() + b"pcb,test\n",
    VISA.encode() + b"pcb,test,anomaly,pcb/Data/Images/Anomaly/1.JPG\n",
], ids=["empty", "UTF-16", "BOM", "semicolons", "other split", "short row", "no mask"])
def test_another_list_than_visas_is_refused(content, visa):
    """The message names the file."""
    (visa / "split_csv/1cls.csv").write_bytes(content)
    with pytest.raises(cada.UserError, match="split_csv/1cls.csv: "):
        cada.read_dataset(visa)


CLEAN = ("{tree}: 2 classes, 20 training and 12 test images, 6 of them defective, 6 with a mask; "
         "0 files not used\n")
MESSY_DATA = [  # (what is done to the data set, what must be printed of it)
    ("", CLEAN),
    ("mkdir a/test/.ipynb; cp a/test/hole/* a/test/.ipynb", CLEAN),
    ("mv a/test/good a/test/OK; mv b/test/good b/test/Normal; mv a/train/good a/train/ok", CLEAN),
    ("mv a ../elsewhere; ln -s ../elsewhere a", CLEAN),
    ("ln -s .. up; ln -s . b/loop; ln -s ../.. a/train/good/up", CLEAN),
    ("touch a/train/good/000.heic", "; 1 files not used {tree}/a/train/good/000.heic\n"),
    ("mv a/train/good a/train/deep; mkdir a/train/good; mv a/train/deep a/train/good",
     "no training images of a"),
    ("rm -r a/train", "no training images of a"),
]


@pytest.mark.parametrize("command, says", MESSY_DATA)
def test_what_was_found_is_told(command, says, tree, capsys):
    """Before the training, in one line. Hidden folders and known names of the good ones are no
    kinds of defects; links to folders above end."""
    spoil(tree, command)
    try:
        cada.read_dataset(tree)
        told = capsys.readouterr().err
    except cada.UserError as e:
        told = str(e)
    assert says.format(tree=tree) in told


# ==== the scripts as a user runs them =============================================================
VARIANTS = {cada: ["raw", "oracle", "regress", "cada"], cnc: ["cnc"]}


def scores_of(out: Path) -> list[dict]:
    """The rows of scores.csv."""
    with open(out / "scores.csv", newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def results_of(out: Path) -> dict:
    """The metrics in metrics.json."""
    return json.loads((out / "metrics.json").read_text())["results"]


def checkpoint_of(out: Path) -> dict:
    """The content of checkpoint.pt."""
    return torch.load(out / "checkpoint.pt", weights_only=True)


def files_in(folder: Path) -> dict:
    """What a run has left there, at any depth: {name: content}."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_numbers(out: Path, script) -> np.ndarray:
    """The scores in scores.csv, (images, variants)."""
    table = []
    for row in scores_of(out):
        table.append([float(row[name]) for name in VARIANTS[script]])
    return np.array(table)


def predictions(capsys) -> list[dict]:
    """What predict has printed."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_defaults_are_the_published_ones(visa):
    """They are small on the demo set, and a flag goes before everything."""
    cases = [
        (cada, ["--data", visa], {
            "teacher": "wide_resnet50_2", "weights": "IMAGENET1K_V1", "image_size": 256,
            "batch_size": 16, "iters": 5000, "lr": 2e-3}),
        (cada, ["--data", DEMO, "--iters", 7], {"teacher": "resnet18", "iters": 7}),
        (cnc, ["--data", visa], {
            "teacher": "ViT-L-14-336-quickgelu", "weights": "openai", "image_size": 336,
            "batch_size": 8, "epochs": 250, "lr": 1e-3, "theta": 5, "tau": 0.001, "experts": 5,
            "top_k": 2, "moe": True, "fnp": True, "constraint": True}),
        (cnc, ["--data", DEMO], {"teacher": "tiny", "image_size": 128, "epochs": 30}),
    ]
    for script, words, expected in cases:
        cfg, _ = script.read_command_line([str(word) for word in words])
        assert expected.items() <= vars(cfg).items()


# A cluster sets these for purposes of its own, and a notebook names a backend that may be missing.
SURROUNDINGS = {"RANK": "1", "WORLD_SIZE": "2", "MPLBACKEND": "module://nowhere",
                "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def trained(data, session_path) -> dict:
    """One training of each script from the shell: its folder, and what it printed."""
    jobs = {}
    for script in (cada, cnc):  # both at once
        name = script.__name__
        command = [sys.executable, f"{name}.py", "--data", data, "--out", session_path / name]
        jobs[script] = subprocess.Popen(
            [*command, *FLAGS[script]], cwd=HERE, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=os.environ | SURROUNDINGS)
    runs = {}
    for script, job in jobs.items():
        stdout, stderr = job.communicate(timeout=100)
        assert job.returncode == 0, stderr
        out = session_path / script.__name__
        runs[script] = SimpleNamespace(
            out=out, checkpoint=out / "checkpoint.pt", files=set(files_in(out)), stdout=stdout,
            stderr=stderr)
    return runs


@BOTH
def test_train_writes_and_prints_what_it_says(script, trained):
    """The metrics are those of the scores that it writes, and the table shows the metrics; in any
    SURROUNDINGS."""
    done = trained[script]
    assert {"checkpoint.pt", "metrics.json", "scores.csv", "heatmaps.png"} <= done.files
    labels = [int(row["label"]) for row in scores_of(done.out)]
    results = results_of(done.out)
    assert list(results) == VARIANTS[script]
    for variant, scores in zip(results, as_numbers(done.out, script).T):
        found = results[variant]
        assert list(found) == ["a", "b", "class mean", "pooled"]
        classes = [auroc(scores[:6], labels[:6]), auroc(scores[6:], labels[6:])]
        assert found["class mean"]["I-AUROC"] == pytest.approx(np.mean(classes))
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
    assert set(files_in(tmp_path)) == done.files - {"checkpoint.pt"}


@BOTH
def test_predict_gives_the_same_scores(script, data, trained, tmp_path, monkeypatch, capsys):
    """It takes files and folders, and needs no data set."""
    monkeypatch.setattr(script, "read_dataset", None)
    paths = [data / "b/test", data / "a/test/hole/001.png"]
    words = ["--checkpoint", trained[script].checkpoint, "--out", tmp_path]
    assert run(script, "predict", *paths, *words) == 0
    rows = {row["path"]: row for row in scores_of(trained[script].out)}
    found = predictions(capsys)
    assert len(found) == len(files_in(tmp_path)) == 7
    for told in found:
        row = rows[told["path"]]
        assert told["score"] == pytest.approx(float(row[script.__name__]), abs=1e-4)
        assert str(told["anomalous"]) == row["anomalous"]
        assert Image.open(told["overlay"]).size == Image.open(told["path"]).size


def test_predict_takes_from_a_folder_what_it_can(data, trained, tmp_path, capsys):
    """A file that cannot be read is told of, and all others are scored. A long name is cut, a link
    to a folder above ends, and what a run has written itself is not scored."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "000.png").write_text("no image")
    (folder / "photo.heic").write_text("not for Pillow")
    shutil.copy(trained[cada].out / "heatmaps.png", folder)
    shutil.copy(data / "a/test/good/000.png", folder / f"{'x' * 240}.png")
    (folder / "up").symlink_to("..")
    words = ["predict", folder, "--checkpoint", trained[cada].checkpoint, "--out", folder]
    for _ in range(2):
        assert run(cada, *words) == 2
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == 1
        assert re.search(r"\b1\b.*photo\.heic", printed.err)
        assert f"cannot read image {folder / '000.png'}" in printed.err
        assert "1 images not scored" in printed.err.splitlines()[-1]


def test_nobody_need_read_the_output(data, trained, tmp_path):
    """A pipe whose reader has gone, as after `| head -1`, or a closed output ends quietly."""
    words = [sys.executable, "cada.py", "predict", data / "a/test/good/000.png", "--checkpoint",
             trained[cada].checkpoint, "--out"]
    jobs = {}
    for i, stdout in enumerate(["| true", ">&-"]):  # both at once
        out = tmp_path / str(i)
        command = f"set -o pipefail; {shlex.join(map(str, [*words, out]))} {stdout}"
        jobs[out] = subprocess.Popen(["bash", "-c", command], cwd=HERE, stderr=subprocess.PIPE)
    for out, job in jobs.items():
        _, stderr = job.communicate(timeout=100)
        assert job.returncode in (0, 128 + signal.SIGPIPE)
        assert b"rror" not in stderr
        assert set(files_in(out)) == {"0000-000.overlay.png"}


@FORKS
@BOTH
def test_neither_cache_nor_class_names_change_a_score(script, tree, trained, tmp_path):
    """And one seed gives one result, since the run that this is compared with was another one.
    (To the last bit, because the 16 training images fill their batches of 4: a batch of another
    size may be rounded differently.) A $ is drawn as text, and a name need not be UTF-8."""
    name = b"00\xe9.png"
    (tree / "a").rename(tree / r"$\cost_$")
    (tree / r"$\cost_$/test/good/000.png").rename(tree / r"$\cost_$/test/good" / os.fsdecode(name))
    out = tmp_path / "out"
    assert run(script, "--data", tree, "--out", out, *FLAGS[script], "--no-cache") == 0
    assert name in (out / "scores.csv").read_bytes()
    np.testing.assert_array_equal(np.sort(as_numbers(out, script), axis=0),
                                  np.sort(as_numbers(trained[script].out, script), axis=0))


def die_after_the_first_checkpoint(script, words: list[str]) -> None:
    """Run a command line, and kill this process as soon as a checkpoint is written."""
    save = script.save_checkpoint

    def save_and_die(*arguments):
        save(*arguments)
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
    assert list(files_in(tmp_path)) == ["checkpoint.pt"]
    assert run(script, "eval", "--out", tmp_path) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(script, "--resume", "--out", tmp_path) == 0
    assert results_of(tmp_path) == results_of(trained[script].out)
    assert scores_of(tmp_path) == scores_of(trained[script].out)


def test_resume_wants_the_same_images(tree, trained, tmp_path, capsys):
    """With more --iters it trains on, also where the data set has moved to; eval takes any other
    set. But with another image some held out for the threshold might be images trained on."""
    out = tmp_path / "out"
    words = ["--resume", "--checkpoint", trained[cada].checkpoint, "--out", out, "--data", tree]
    assert run(cada, *words, "--iters", 3) == 0
    checkpoint = checkpoint_of(out)
    assert checkpoint["step"] == checkpoint["config"]["iters"] == 3
    assert run(cada, "eval", "--out", out, "--data", tree / "b") == 0
    assert {row["class"] for row in scores_of(out)} == {"b"}

    before = files_in(out)
    draw(tree / "a/train/good/010.png", 0)
    assert run(cada, *words, "--iters", 4) == 2
    assert "not the training images" in capsys.readouterr().err.splitlines()[-1]
    assert files_in(out) == before


def test_control_c_ends_in_one_line(data, tmp_path, monkeypatch, capsys):
    """Ctrl-C is no crash: the exit code is 130, as in a shell. What an earlier run left stays."""
    (tmp_path / "checkpoint.pt").write_text("of an earlier training")

    def press(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cada.RevDist, "forward", press)
    assert run(cada, "--data", data, "--out", tmp_path, *FLAGS[cada]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("cada.py: error: interrupted")
    assert files_in(tmp_path) == {"checkpoint.pt": b"of an earlier training"}


@pytest.mark.parametrize("script, name", [(cada, "RevDist"), (cnc, "CNC")])
def test_a_training_that_diverges_keeps_its_last_checkpoint(script, name, data, tmp_path,
                                                            monkeypatch, capsys):
    """From the second step on the loss is no number here. The checkpoint of the first step stays
    good for --resume."""
    detector = getattr(script, name)
    forward = detector.forward
    factors = iter([1] + 9 * [math.nan])
    monkeypatch.setattr(detector, "forward",
                        lambda *args, **more: next(factors) * forward(*args, **more))
    assert run(script, "--data", data, "--out", tmp_path, *FLAGS[script]) == 2
    assert "lower --lr" in capsys.readouterr().err.splitlines()[-1]
    assert list(files_in(tmp_path)) == ["checkpoint.pt"]
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint["step"] == 1
    assert all(w.isfinite().all() for w in checkpoint["weights"]["student"].values())


def test_threshold_comes_from_images_kept_back(data, trained, capsys):
    """It is the 99th of 99 scores; of fewer, as of the four here, the largest, which is told. With
    --holdout 0 all images serve for both."""
    assert cada.conformal_threshold(torch.arange(99.0)) == 98
    assert cada.conformal_threshold(torch.arange(299.0)) == 296
    checkpoint = checkpoint_of(trained[cnc].out)
    cfg = cnc.Config(**checkpoint["config"])
    normal, _ = cnc.read_dataset(data)
    kept, held = cnc.hold_out(cfg, normal, checkpoint)
    assert len(held) == 4
    assert sorted(kept + held) == list(range(20))
    assert "4 normal images; for at most 1 %" in capsys.readouterr().err
    scores = []
    for _, maps in cnc.describe_images(cfg, cnc.build(cfg, checkpoint), normal):
        scores += cnc.image_score(cnc.smooth(maps)).tolist()
    highest = max(scores[i] for i in held)
    assert checkpoint["thresholds"]["cnc"] == pytest.approx(highest, rel=1e-4)
    kept, held = cnc.hold_out(cnc.Config(holdout=0.0), normal, None)
    assert kept == held == list(range(20))


@BOTH
def test_good_images_and_a_teacher_from_a_file(script, tree, trained, tmp_path, monkeypatch,
                                               capsys):
    """Good images are enough to train and predict. A teacher's weights are read from their file
    each time; the checkpoint knows their fingerprint."""
    def write_weights(seed):
        torch.manual_seed(seed)
        model = torchvision.models.resnet18() if script is cada else cnc.tiny_clip(64)
        torch.save(model.state_dict(), "weights.pt")

    monkeypatch.chdir(tmp_path)
    write_weights(5)
    spoil(tree, ONLY_TRAINING)
    words = ["--data", "tree", "--out", "out", *FLAGS[script], "--weights", "weights.pt"]
    assert run(script, *words) == 0
    printed = capsys.readouterr()
    assert "nothing to evaluate" in printed.out
    assert "RANDOM" not in printed.err
    assert list(files_in(tmp_path / "out")) == ["checkpoint.pt"]
    monkeypatch.chdir(tree)  # the paths lead to the same files from another folder
    words = ["predict", "a/train/good/000.png", "--out", tmp_path / "out"]
    assert run(script, *words) == 0

    # Another network in the file is noticed, and so is no file, or any in place of a random one.
    monkeypatch.chdir(tmp_path)
    random = ["eval", "--checkpoint", trained[script].checkpoint, "--out", tmp_path]
    assert run(script, *random, "--weights", "weights.pt") == 2
    Path("weights.pt").unlink()
    words = ["predict", tree / "a/train/good/000.png", "--out", tmp_path / "out"]
    for _ in ("no file", "another network"):
        assert run(script, *words) == 2
        assert "--weights" in capsys.readouterr().err.splitlines()[-1]
        write_weights(6)
    write_weights(5)
    assert run(script, *words, "--weights", "weights.pt") == 0


@pytest.mark.parametrize("command, metrics", [
    ("rm -r ?/ground_truth", ["I-AUROC", "I-AP", "I-F1max"]),
    ("rm -r ?/test/hole ?/ground_truth", []),
    ("rm -r ?/test/good ?/ground_truth", []),
])
def test_data_may_lack_masks_or_a_kind_of_images(command, metrics, tree, trained, tmp_path, capsys):
    """Without masks there are the metrics of images. With one kind of image only there is a line in
    their place; what is flagged, and every score, are told all the same. Of an unknown class there
    is no oracle."""
    spoil(tree, f"{command}; mv a new")
    words = ["--checkpoint", trained[cada].checkpoint, "--data", tree, "--out", tmp_path]
    assert run(cada, "eval", *words) == 0
    results = results_of(tmp_path)
    assert list(results) == ["raw", "regress", "cada"]
    assert list(results["cada"]["pooled"]) == metrics
    printed = capsys.readouterr().out
    assert ("no table" in printed) != bool(metrics)
    told = [row["anomalous"] for row in scores_of(tmp_path)]
    good, bad = re.search(r"flags (\d+) of \d+ good and (\d+) of", printed).groups()
    assert int(good) + int(bad) == told.count("True")
    assert len(told) >= 6


def test_nonsense_is_not_reported(data, trained, tmp_path, capsys):
    """Where a map is not finite, neither eval nor predict has an answer."""
    checkpoint = checkpoint_of(trained[cada].out)
    checkpoint["weights"]["student"]["decode1.0.conv1.weight"] *= math.nan
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    for words in (["eval"], ["predict", data / "a/test/good/000.png"]):
        assert run(cada, *words, "--out", tmp_path) == 2
        printed = capsys.readouterr()
        assert not printed.out
        assert "an anomaly map is not finite" in printed.err


def test_pictures_cut_long_names(data, tmp_path):
    """What is beyond the twentieth letter of a class name changes nothing in them."""
    cfg = cada.Config(out=str(tmp_path))
    pictures = []
    for count, letters in ((12, 40), (12, 20), (11, 20)):
        samples = []
        for i in range(count):
            name = f"class {i:02} {'x' * 40}"[:letters]
            samples.append(cada.Sample(data / "a/test/good/000.png", name, 1))
        cada.plot_distributions(cfg, samples, {"raw": np.arange(count)}, {"raw": {"pooled": {}}},
                                {"raw": 9})
        cada.plot_heatmaps(cfg, samples, np.zeros((count, 8, 8)), {}, {"thresholds": {}})
        pictures.append(files_in(tmp_path))
    assert pictures[0] == pictures[1]
    assert pictures[1].items().isdisjoint(pictures[2].items())


def test_cada_on_cnc(data, trained, tmp_path, monkeypatch, capsys):
    """CADA is fitted to a CNC that stays as it is. Its checkpoint needs no other file, and it has
    a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("cnc.pt").write_bytes(trained[cnc].checkpoint.read_bytes())
    assert run(cada, "--cnc", "cnc.pt", "--data", data) == 0
    Path("cnc.pt").unlink()
    out = Path("runs/cada-on-cnc")
    assert set(files_in(tmp_path)) == trained[cada].files
    scores = scores_of(out)
    raw = [float(row["raw"]) for row in scores]
    assert raw == pytest.approx(as_numbers(trained[cnc].out, cnc)[:, 0].tolist(), abs=1e-4)
    assert run(cada, "eval", "--out", out) == 0
    assert scores_of(out) == scores
    capsys.readouterr()
    assert run(cada, "predict", data / "a/test/hole/000.png", "--out", out) == 0
    assert predictions(capsys)[0]["score"] == pytest.approx(float(scores[3]["cada"]), abs=1e-3)


def train_a_share(script, words: list[str], rank: int, count: int) -> None:
    """What one of torchrun's `count` processes does. Left out is all in which a half of the images
    differs from all of them: BatchNorm, dropout, the mean margin and the balance of experts."""
    script.UNDER_TORCHRUN = True
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
    if rank > 0:
        torch.save = None  # only the first process writes
    sys.exit(script.main(words))


@FORKS
@BOTH
def test_two_processes_learn_what_one_does(script, tree, tmp_path):
    """Each sees a half of every batch, here of all 20 images, and both follow the mean of their
    gradients."""
    spoil(tree, ONLY_TRAINING)
    fork = multiprocessing.get_context("fork")
    words = ["--data", str(tree), *FLAGS[script], "--batch-size", "20", "--holdout", "0"]
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
        students.append(checkpoint_of(out)["weights"]["student"])

    start, one, two = (torch.cat([w.flatten() for w in s.values()]) for s in students)
    assert (two - one).norm() < 1e-3 * (one - start).norm()


# ==== what the README says ========================================================================
README = (HERE / "README.md").read_text(encoding="utf-8")
SOURCES = [(HERE / name).read_text(encoding="utf-8") for name in ("cada.py", "cnc.py")]


def test_readme_lists_every_departure():
    """Its list and the tags [ours] Dn in the code name the same set, from D1 without a gap."""
    tags = re.findall(r"\[ours\]((?:[\s#,]+D\d+)*)", SOURCES[0] + SOURCES[1])
    assert tags.count("") == 2  # each docstring explains the tag itself once
    in_code = set(re.findall(r"D\d+", " ".join(tags)))
    listed = re.findall(r"^(?:- \*\*|\|\s*)(D\d+)\b", README, re.M)
    assert sorted(listed) == sorted(in_code)
    assert in_code == {f"D{i + 1}" for i in range(len(in_code))}


def test_links_of_the_readme_lead_to_files():
    """Links to files of the repository lead somewhere."""
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (HERE / link).exists(), link


def test_every_command_of_the_readme_runs(data, tmp_path, monkeypatch, capsys):
    """Flags after those of the README, which go before them, make it small; so does the data."""
    for name in ("mvtec", "visa", "elpv", "mine"):
        shutil.copytree(data / "b", tmp_path / "data" / name / "bottle")
    shutil.copytree(data / "b/test/good", tmp_path / "folder")
    Image.fromarray(COLOURS).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)

    commands = re.findall(r"^ *python (cada|cnc)\.py (.+)$", README, re.M)
    assert len(commands) >= 6
    for name, text in commands:
        script = cada if name == "cada" else cnc
        words = shlex.split(text, comments=True)
        if not {"eval", "predict", "--resume"} & set(words):
            words += FLAGS[script]
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
    """The run ends with exit code 2 and a message that says something. What an earlier run left in
    --out stays, and nothing is added. Our own message is one line, and the last."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    for name in ("checkpoint.pt", "scores.csv", "heatmaps.png"):
        (out / name).write_text("of an earlier training")
    before = files_in(out)
    assert run(script, *words, "--out", out) == 2
    error = capsys.readouterr().err
    if "error: " in error:
        assert says in error.splitlines()[-1]
        assert error.splitlines()[-1].startswith(f"{script.__name__}.py: error: ")
    else:
        assert says in error  # tyro's frame
    assert files_in(out) == before


BAD_COMMAND_LINES = [  # (script, command line, what the message must say)
    (cada, "--itres 3", "--iters"),
    (cada, "--iters ten", "--iters"),
    (cada, "explain", "'explain'"),
    (cada, "train {data}", "name images after predict"),
    (cada, "predict --checkpoint {cada}", "name images after predict"),
    (cada, "{train} --seed -1", "--seed"),
    (cada, "{train} --seed 1760000000000", "--seed"),
    (cada, "{train} --batch-size 0", "--batch-size"),
    (cada, "{train} --iters 0", "--iters"),
    (cada, "{train} --lr -1", "--lr"),
    (cada, "{train} --lr nan", "--lr"),
    (cada, "{train} --workers -1", "--workers"),
    (cada, "{train} --image-size 32", "--image-size"),
    (cada, "{train} --image-size 100", "--image-size"),
    (cada, "{train} --holdout 1", "--holdout"),
    (cada, "{train} --checkpoint {cada}", "--checkpoint"),
    (cada, "{train} --data nowhere", "nowhere: no such folder"),
    (cada, "{train} --device abacus", "--device"),
    (cada, "{train} --teacher vgg16", "--teacher vgg16"),
    (cada, "{train} --weights IMAGENET1K_V9", "--weights IMAGENET1K_V9"),
    (cada, "{train} --weights {malicious}", "malicious.pt"),
    (cada, "{train} --cnc {cada}", "no checkpoint of cnc.py"),
    (cada, "--cnc {cnc} --data {other}", "not the training images"),
    (cada, "eval", "train first"),
    (cada, "eval --checkpoint {malicious}", "malicious.pt"),
    (cada, "eval --checkpoint {cnc}", "cnc.py wrote it"),
    (cada, "eval --checkpoint {cada} --teacher resnet34", "--teacher"),
    (cada, "eval --checkpoint {cada} --image-size 96", "--image-size"),
    (cada, "eval --checkpoint {cada} --seed 1", "--seed"),
    (cada, "eval --checkpoint {cada} --data {empty}", "{empty}"),
    (cada, "--resume --checkpoint {cada} --seed 1", "--seed"),
    (cada, "--resume --checkpoint {cada} --holdout 0.3", "--holdout"),
    (cada, "--resume --checkpoint {cada} --iters 9 --data {other}", "not the training images"),
    (cada, "predict nowhere.png --checkpoint {cada}", "nowhere.png"),
    (cada, "predict {empty} --checkpoint {cada}", "no image"),
    (cnc, "{train} --top-k 6", "--top-k"),
    (cnc, "{train} --theta 2", "--theta"),
    (cnc, "{train} --theta -1", "--theta"),
    (cnc, "{train} --image-size -32", "--image-size"),
    (cnc, "{train} --image-size 70", "multiples of 16"),
    (cnc, "{train} --weights openai", "--weights openai"),
    (cnc, "{train} --weights {malicious}", "malicious.pt"),
    (cnc, "{train} --weights {weights}", "weights.pt"),
    (cnc, "{train} --teacher RN50", "plain ViT"),
    (cnc, "{train} --teacher ViT-B-16-SigLIP --image-size 224", "SigLIP"),
    (cnc, "eval --checkpoint {cnc} --no-moe", "--moe"),
    (cnc, "eval --checkpoint {cnc} --seed 1", "--seed"),
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
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    (tmp_path / "empty").mkdir()
    places = {"data": data, "other": data / "a", "empty": tmp_path / "empty",
              "malicious": malicious, "weights": tmp_path / "weights.pt",
              "cada": trained[cada].checkpoint, "cnc": trained[cnc].checkpoint,
              "train": " ".join(["--data", str(data), *FLAGS[script]])}
    words = text.format(**places).split()
    check_failure(script, words, says.format(**places), capsys, tmp_path)
    assert not ran.exists()
    pickle.loads(malicious.read_bytes())
    assert ran.exists()  # so the payload works


@pytest.mark.parametrize("count, text, says", [
    (2, "eval --checkpoint {cada}", "torchrun: is for training"),
    (3, "{train}", "--batch-size: give a multiple of 3"),
    (17, "{train} --batch-size 17", "17 processes for 16 training images"),
])
def test_bad_calls_of_torchrun(count, text, says, data, trained, tmp_path, monkeypatch, capsys):
    """Evaluation is one process's work, and each process needs an image and a part of the batch."""
    monkeypatch.setattr(cada, "UNDER_TORCHRUN", True)
    monkeypatch.setattr(cada, "WORLD_SIZE", count)
    text = text.format(cada=trained[cada].checkpoint, train=" ".join(FLAGS[cada]))
    check_failure(cada, [*text.split(), "--data", data], says, capsys, tmp_path)


BAD_DATA = [  # (what is done to the data set, what the message must say)
    ("rm a/train/good/*", "no training images of a"),
    ("rm ?/train/good/00[1-9].png", "2 training images"),
    ("echo text > a/train/good/003.png", "good/003.png"),
    ("truncate --size 600 a/test/hole/001.png", "hole/001.png"),
    ("cp dark.png a/train/good/001.png", "good/001.png: is nearly black"),
    ("rm a/ground_truth/hole/001_mask.png", "ground_truth/hole for "),
    ("mv a/ground_truth/hole a/ground_truth/hoel", "ground_truth/hole for "),
    ("cd a/ground_truth/hole; mkdir 000; mv 000_mask.png 000", "ground_truth/hole for "),
    ("echo text > a/ground_truth/hole/001_mask.png", "hole/001_mask.png"),
    ("cp b/test/good/000.png a/ground_truth/hole/001_mask.png", "001_mask.png: its image has"),
    ("cp turned.png a/test/hole/001.png", "EXIF"),
    ("cp a/ground_truth/hole/000_mask.png a/test/hole", "test/hole/000_mask.png shares its name"),
    ("cp a/test/hole/000.png a/test/hole/000.jpg", "test/hole/000.png shares its name"),
    ("cp black.png a/ground_truth/hole/000.png", "hole/000_mask.png shares its name"),
    ("rm -r b/*t*; for i in a/ground_truth/hole/*; do cp black.png $i; done", "no mask"),
    ("for i in a b; do mv $i/test $i/test_public; mv $i/ground_truth $i/test_public; done",
     "no mask"),
]


@pytest.mark.parametrize("command, says", BAD_DATA)
def test_bad_data(command, says, tree, tmp_path, capsys):
    """A broken data set stops the run before the training; the message names the file."""
    Image.new("RGB", (64, 64), "grey").save(tree / "turned.png", exif=TURNED)
    Image.fromarray(DARK).save(tree / "dark.png")
    Image.new("L", (64, 64)).save(tree / "black.png")
    spoil(tree, command)
    check_failure(cada, ["--data", tree, *FLAGS[cada]], says, capsys, tmp_path)


@FORKS
@pytest.mark.parametrize("flag, says", [("--cache", "--no-cache"), ("--no-cache", "no checkpoint")])
def test_a_full_disk(flag, says, data, tmp_path, capsys):
    """Here no file may be larger than 100 kB. The message names what had no room, and the way
    without it; no part of a file is left."""
    import resource  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        check_failure(cada, ["--data", data, *FLAGS[cada], flag], says, capsys, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@FORKS
def test_a_worker_finds_a_mistake(tree, tmp_path, monkeypatch, capsys):
    """A file that breaks during the training ends in one line, as anywhere."""
    (tree / "a/train/good/003.png").write_text("no image")
    monkeypatch.setattr(cada, "check_files", lambda sample: True)
    words = ["--data", tree, *FLAGS[cada], "--workers", 2]
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    check_failure(cada, words, "error: cannot read image", capsys, tmp_path)
    gc.collect()  # the workers end here, and need no more than that interval


def test_a_script_on_its_own(data, tmp_path, monkeypatch, capsys):
    """The demo set need not lie beside it."""
    monkeypatch.setattr(cada, "HERE", tmp_path)
    check_failure(cada, [], "data/demo: no such folder", capsys, tmp_path)
    assert cada.read_command_line(["--data", str(data)])[0].iters == 5000


@BOTH
def test_no_network(script, data, tmp_path, monkeypatch, capsys):
    """The message names the weights and the way without them."""
    def download(*args, **more):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # what was downloaded before must not help
    monkeypatch.setattr(torch.hub, "urlopen", download)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    words = "--weights IMAGENET1K_V1"
    if script is cnc:
        words = "--weights openai --teacher ViT-B-32-quickgelu --image-size 224"
    words = ["--data", data, *FLAGS[script], *words.split()]
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
    cfg = small_config(script, out=str(folder), batch_size=batch_size, **settings)
    detector = script.build(cfg, None).train()
    samples = []
    for i in range(2 * batch_size):
        draw(folder / f"{i}.png", i, size=(256, 256))
        samples.append(script.Sample(folder / f"{i}.png"))
    learners = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learners, 1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        detector(next(features)).backward()
        optimizer.step()

    took = {}
    for cfg.cache in (True, False):
        batches = script.shuffled_batches(cfg, len(samples), 6)  # as many as `seconds` makes steps
        features = script.teacher_features(cfg, detector, samples, batches)
        took[cfg.cache] = seconds(step)  # its first call fills the cache
    ratio = took[False] / took[True]
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
    images = torch.cat([*cnc.image_batches(small_config(cnc), detector, samples)])
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
        cfg = small_config(cnc, fnp=text, constraint=text)
        detector = cnc.build(cfg, None)
        detector.teacher.whitening.estimate(detector.teacher,
                                            cnc.image_batches(cfg, detector, normal))
        tokens = moved_tokens(detector, normal, 0)
        learners = [p for p in detector.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learners, 1e-3)
        detector.train()
        for step, rows in enumerate(cnc.shuffled_batches(cfg, len(normal), 160)):
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
        bench_training(cada, Path(temporary), 4, teacher="wide_resnet50_2", image_size=256)
    bench_metrics()
