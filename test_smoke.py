"""Do the two scripts do what they say?

    pytest -q test_smoke.py       needs no GPU, no network and no data set
    python test_smoke.py text     is no test: what is a text worth that means something?

The first part shows the ideas of both papers on a few numbers. The next two look into the two
detectors, one after the other. Then come the data, the scripts as a user runs them, what the README
says, and what happens to bad input. The scripts run on a made data set of two classes.
"""
import contextlib
import csv
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.model_selection import cross_val_predict
from torch.testing import assert_close

import cada
import cnc

HERE = Path(__file__).resolve().parent
DEMO = HERE / "data/demo"
BOTH = pytest.mark.parametrize("script", [cada, cnc], ids=["cada", "cnc"])
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
torch.set_num_threads(1)  # the tensors are so small that a second thread costs more than it gains

# What makes a run small: a step of RevDist; eight of CNC, of which four are warm-up.
SMALL = "--image-size 64 --weights none --batch-size 4 --holdout 0.2 --workers 0 --device cpu "
FLAGS = {
    cada: (SMALL + "--teacher resnet18 --iters 1").split(),
    cnc: (SMALL + "--teacher tiny --epochs 2 --theta 1").split(),
}
STEPS = {cada: ["--iters", "2"], cnc: []}  # more of them, where a run is to be interrupted


def run(script, *words):
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


def random_images(count):
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


def test_balance_loss_evens_the_experts():
    """It is 0 if all are used alike, 4 if one of five gets all, and lowers the favourite."""
    moe = cnc.GatedMoE(8, 5, 2)
    moe.gate.weight.data.zero_()
    found = []
    for favour in (0.0, 30.0, 3.0):
        moe.gate.bias.data = torch.tensor([favour, 0, 0, 0, 0])
        _, balance = moe(torch.randn(2, 30, 8))
        found.append(balance.item())
    assert found[:2] == pytest.approx([0, 4], abs=1e-3)
    balance.backward()
    assert moe.gate.bias.grad[0] > 0 > moe.gate.bias.grad[2]


def test_constraint_is_a_cross_entropy():
    """The constraint is the softmax cross entropy of cosines, in which the normal text is right and
    has a bonus; at tau = 0.001 it is nearly a hinge of the margin."""
    detector = small_detector(cnc)
    v = F.normalize(torch.randn(3, 2, 16, 192), dim=-1)  # (taps, B, N, D)
    text = F.normalize(torch.randn(3, 2, 192), dim=-1)  # (taps, 2, D): t_n and t_a
    std = cnc.margin(v, text).std((1, 2), keepdim=True)
    detector.normal.margin_std = std
    for tau, slack in ((0.001, 2.0), (0.07, 1.0)):
        detector.cfg.tau = tau
        found = detector.constraint(v, text, slack).item()
        cosines = torch.einsum("lbnd,lkd->klbn", v, text)
        cosines[0] += slack * std
        normal = torch.zeros(1, 3, 2, 16, dtype=torch.long)
        expected = tau * F.cross_entropy(cosines[None] / tau, normal)
        assert found == pytest.approx(expected.item(), abs=1e-6)
        if tau == 0.001:
            hinge = F.relu(-slack * std - cnc.margin(v, text)).mean()
            assert found == pytest.approx(hinge.item(), rel=0.05)


def test_promotion_draws_normal_patches_together():
    """psi, in 0..1, grows with the margin and is a half for a margin of 0. The more normal a patch,
    the nearer the decoded one is moved to it."""
    detector = small_detector(cnc)
    t_n, t_a, content, mistake = torch.eye(192)[:4]
    text = torch.stack([t_n, t_a]).expand(3, 2, 192)  # the same for each tap
    share = torch.linspace(0, 1, 5)[:, None]  # of five patches, more and more normal
    e = content + share * t_n + (1 - share) * t_a
    e = F.normalize(e, dim=-1).expand(3, 1, 5, 192)
    d = F.normalize(e + 0.3 * mistake, dim=-1)
    detector.normal.margin_std = cnc.margin(e, text).std((1, 2), keepdim=True)

    psi = detector.psi(e, text)[0, 0]
    assert (psi.diff() > 0).all()
    assert psi[2].item() == pytest.approx(0.5)
    before = 1 - F.cosine_similarity(e, d, dim=-1)
    gain = before - detector.distance(e, d, text)
    assert (gain.diff() > 0).all()


# ==== the ideas: metrics ==========================================================================
def aupro_by_definition(maps, masks):
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
    """AUROC, AP and F1max are scikit-learn's, and AUPRO is as defined above."""
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
    expected = {"P-AUROC": roc_auc_score(labels, scores), "P-F1max": f1.max(),
                "P-AP": average_precision_score(labels, scores)}
    found = cada.ranking_metrics("P", maps, masks)
    assert found.pop("AUPRO") == pytest.approx(aupro_by_definition(maps, masks), abs=1e-4)
    assert found == pytest.approx(expected, abs=1e-6)


# ==== the ideas: CADA =============================================================================
LEVEL = torch.tensor([0.05, 0.2, 0.4, 0.1, 0.7])  # of five classes
SPREAD = torch.tensor([0.02, 0.1, 0.05, 0.3, 0.15])


def five_classes(seed, raised):
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


def test_cada_undoes_the_distortion_of_classes():
    """One ranking of all images becomes nearly as good as for one who knows the classes, and the
    order within the classes stays, but for a little."""
    features, maps, *_ = five_classes(1, raised=0)
    head = fit(features, maps)
    features, maps, classes, labels = five_classes(2, raised=2.5)
    raw = maps.amax((1, 2))
    aligned = cada.align(maps, *head.predict(features)).amax((1, 2))
    known = (raw - LEVEL[classes]) / SPREAD[classes]
    assert roc_auc_score(labels, aligned) > roc_auc_score(labels, known) - 0.03
    assert roc_auc_score(labels, aligned) > roc_auc_score(labels, raw) + 0.15

    def mean_of_classes(scores):
        return np.mean([roc_auc_score(labels[:40], part) for part in scores.split(40)])

    assert mean_of_classes(aligned) > mean_of_classes(raw) - 0.03


@pytest.mark.parametrize("features, maps", [
    (torch.randn(10, 64), torch.rand(10, 8, 8)),
    (torch.ones(20, 64), torch.rand(20, 8, 8)),
    (torch.randn(10, 64), torch.zeros(10, 8, 8)),
], ids=["few images", "equal images", "zero maps"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # PCA of equal images
def test_gamma_is_above_u_for_any_images(features, maps):
    """Alignment divides by gamma - u, so neither few nor degenerate images may make it 0."""
    head = fit(features, maps)
    for scale in (0, 1, 1e3, -1e6):  # images that it has never seen the like of
        u, gamma = head.predict(torch.cat([features, scale * torch.randn(9, 64)]))
        assert (gamma > u).all()
        assert (gamma - u).isfinite().all()


def test_unseen_predictions_leave_one_image_out():
    """They are what fits on all other images predict, with the penalty that then errs least."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 4))
    y = 5 + x @ rng.normal(size=(4, 2)) + rng.normal(size=(12, 2))
    weight, bias, unseen = cada.fit_regression(torch.from_numpy(x), torch.from_numpy(y))
    left_out = []
    for penalty in cada.PENALTIES:
        left_out.append(cross_val_predict(Ridge(penalty), x, y, cv=12))
    best = np.square(y - left_out).mean((1, 2)).argmin()
    np.testing.assert_allclose(unseen, left_out[best], atol=1e-6)
    whole = Ridge(cada.PENALTIES[best]).fit(x, y)
    np.testing.assert_allclose(x @ weight.numpy() + bias.numpy(), whole.predict(x))


def test_cada_aligns_each_image_by_itself():
    """The other images of a batch do not matter, and nor does a channel that hardly varied
    in training."""
    features, maps, *_ = five_classes(1, raised=0)
    features[:, 5] = 0.3 + 1e-6 * features[:, 4]
    head = fit(features, maps)
    u, gamma = head.regress(features)
    features[:, 5] += 0.01
    assert_close(head.regress(features[3:4]), (u[3:4], gamma[3:4]))


def test_snapping_forgives_small_errors():
    """Features that are a little off move what the regression says of every image by some per cent.
    Snapped, most images keep u, and a level gives all its images the same number."""
    features, maps, *_ = five_classes(1, raised=0)
    head = fit(features, maps)
    off = features + 0.3 * torch.randn(200, 64, generator=torch.Generator().manual_seed(0))

    def moved(method):
        """The share of images whose u changes by more than 2 %."""
        ratio = method(off)[0] / method(features)[0]
        return ((ratio - 1).abs() > 0.02).float().mean()

    assert moved(head.regress) > 0.5
    assert moved(head.predict) < 0.2
    assert len(head.predict(off)[0].unique()) < 50  # of 200 images


# ==== RevDist =====================================================================================


@pytest.mark.parametrize("name, c1, millions", [
    ("wide_resnet50_2", 256, [24.86, 48.26, 17.84, 5.32, 1.76]),  # RD's table
    ("resnext50_32x4d", 256, None),
    ("resnet18", 64, None),
])
def test_shapes_of_revdist(name, c1, millions):
    """The student answers in the teacher's shapes, also with other kinds of residual blocks.
    Nothing reads layer4 of the teacher, so it is not there."""
    with torch.device("meta"):
        resnet = torchvision.models.get_model(name, weights=None)
        student = cada.Student(resnet)
        teacher = cada.Teacher(resnet, random=True)
        encoded = teacher(torch.empty(2, 3, 256, 256))
    decoded = student([e.float() for e in encoded])
    shapes = [(2, c1, 64, 64), (2, 2 * c1, 32, 32), (2, 4 * c1, 16, 16)]
    assert [e.shape for e in encoded] == [d.shape for d in decoded] == shapes
    if millions:
        parts = [teacher, student.bottleneck, student.decode3, student.decode2, student.decode1]
        counts = [sum(p.numel() for p in part.parameters()) for part in parts]
        assert [round(count / 1e6, 2) for count in counts] == millions


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
    mean of the highest 1 %; a picture is clear up to half the threshold, and hottest from 1.5
    of it on."""
    point = torch.zeros(1, 256, 256)
    point[0, 128, 128] = 1
    profile = cada.smooth(point)[0].sum(0)
    offset = torch.arange(256.0) - 128
    variance = profile @ offset.square()
    assert variance == pytest.approx(16, rel=0.01)
    maps = torch.rand(3, 64, 64)
    ends = maps[:, 0, :2].sort().values.unbind(1)  # any u and gamma
    one = cada.smooth(cada.align(maps, *ends))
    other = cada.align(cada.smooth(maps), *ends)
    assert_close(one, other, rtol=1e-3, atol=1e-3)
    ramp = torch.arange(200.0).reshape(1, 10, 20)
    assert cada.image_score(ramp).tolist() == [198.5]
    white = Image.new("RGB", (5, 1), "white")
    colours = np.asarray(cada.overlay(white, torch.tensor([[0, 0.5, 1, 1.5, 9]]), 1.0))[0]
    assert (colours[:2] == 255).all()
    assert (colours[2] < 255).any()
    assert (colours[3] == colours[4]).all()


# ==== CNC =========================================================================================
@pytest.fixture(scope="module")
def tokens():
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


def test_shapes_of_cnc(on_meta, monkeypatch):
    """The student answers in the teacher's shapes."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **more: contextlib.nullcontext())
    with torch.device("meta"):
        detector = cnc.CNC(cnc.Config(weights="none"))  # ViT-L-14-336
        features = detector.teacher(torch.empty(2, 3, 336, 336))
        encoded, decoded, _ = detector.decode(features)
        joined = detector.teacher.joint(encoded[0])
    assert detector.teacher.taps == [8, 16, 24]
    assert encoded.shape == decoded.shape == (3, 2, 1 + 24 ** 2, 1024)
    assert joined.shape == (2, 1 + 24 ** 2, 768)
    assert detector.text().shape == (3, 2, 768)


def test_taps_and_joint_space_are_clips():
    """No block after the last tap is run. The CLS token of the last block, projected, is what CLIP
    says of the image."""
    teacher = small_detector(cnc).teacher
    teacher.whitening = torch.nn.Identity()  # as if it were trained: its tokens are CLIP's own
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


PLAIN = {"experts": 1, "top_k": 1, "fnp": False, "constraint": False}


def cnc_gradients(tokens, warm_up, **settings):
    """The gradients of the whole loss: the student's as one vector, and the prompts' or None."""
    detector = small_detector(cnc, **settings)
    detector.take_statistics(torch.stack(tokens).float())
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
    joint = detector.teacher.joint
    e = joint(encoded)[:, :, 1:]
    d = joint(decoded)[:, :, 1:]
    distance = 1 - F.cosine_similarity(e, d, dim=-1).mean().item()
    assert detector(tokens).item() == pytest.approx(distance, abs=1e-6)


def learn_a_part_of_the_demo(change, steps, **settings):
    """P-metrics, on defective images, of a small CNC whose teacher's tokens (taps, images, 1 + N,
    C) are changed by change(detector, tokens, share of each patch that a defect covers)."""
    normal, test = cnc.read_dataset(DEMO)
    normal = normal[::2]
    test = [s for s in test if s.label]
    masks = cnc.load_masks(test, 64)
    covered = F.avg_pool2d(torch.from_numpy(masks).float()[:, None], 16).flatten(1)
    cfg = small_config(cnc, **settings)
    detector = cnc.build(cfg, None)
    detector.teacher.whitening.estimate(cnc.all_tokens(cfg, detector, normal))
    tokens = change(detector, cnc.all_tokens(cfg, detector, normal), torch.zeros(len(normal), 16))
    detector.take_statistics(tokens)

    optimizer = torch.optim.Adam(detector.parameters(), 1e-3)
    detector.train()
    for step, rows in enumerate(cnc.shuffled_batches(cfg, len(normal), steps)):
        loss = detector(list(tokens[:, rows]), warm_up=step < 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    tokens = change(detector, cnc.all_tokens(cfg, detector, test), covered)
    with torch.no_grad():
        maps = cnc.smooth(detector.eval().describe(list(tokens))[1])
    return cnc.ranking_metrics("P", maps.numpy(), masks)


def shared_mean(detector, tokens, covered):
    """Tokens with a mean of three times their length, as a trained CLIP's have one: all are alike
    by a cosine."""
    direction = torch.randn(3, 1, 1, 192, generator=torch.Generator().manual_seed(0))
    return tokens + 3 * 192 ** 0.5 * F.normalize(direction, dim=-1)


def test_a_mean_that_all_tokens_share_does_no_harm():
    """A cosine alone would see nothing but the mean."""
    plain = learn_a_part_of_the_demo(lambda detector, tokens, covered: tokens, 40)
    shifted = learn_a_part_of_the_demo(shared_mean, 40)
    assert plain["P-AUROC"] > 0.6
    assert shifted["P-AUROC"] > plain["P-AUROC"] - 0.03


def test_text_that_knows_every_defect(data, monkeypatch, capsys):
    """Low margins where the masks are make an AUROC of 100, by patches, and without masks by
    images."""
    _, test = cnc.read_dataset(data)
    defective = torch.from_numpy(cnc.load_masks(test, 4)).flatten(1).float()
    monkeypatch.setattr(cnc, "margin", lambda v, text: -torch.stack(3 * [defective]))
    detector = small_detector(cnc)
    cnc.report_text(detector.cfg, detector, test)
    for s in test:
        s.mask = None
    cnc.report_text(detector.cfg, detector, test)
    assert capsys.readouterr().out.count("100.0 100.0 100.0 (50") == 2


def test_map_of_cnc_shows_where_the_decoder_fails(tokens):
    """All patches are reproduced but one: the map is highest at its centre and 0 above its
    neighbours."""
    detector = small_detector(cnc, fnp=False)
    row = 2  # of four, and the second column; a patch has 16 x 16 pixels
    column = 1

    def fail_at_one_patch(encoded):
        decoded = encoded.clone()
        decoded[:, :, 1 + 4 * row + column] *= -1
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
def test_features_that_float16_cannot_hold(script, data):
    """They would be infinite, and the image's score no number: "not anomalous"."""
    detector = small_detector(script)
    block = "clip.visual.transformer.resblocks.0"
    name = "layers.1.0.bn1.weight" if script is cada else f"{block}.mlp.c_proj.weight"
    detector.teacher.get_parameter(name).mul_(1e9)
    detector.teacher.whitening = torch.nn.Identity()
    normal, _ = script.read_dataset(data)
    with pytest.raises(script.UserError, match="--weights none: its features do not fit float16"):
        next(script.describe_images(small_config(script), detector, normal))


@BOTH
@torch.no_grad()
def test_bfloat16_is_close_to_float32(script, monkeypatch):
    """This is what a GPU runs, as far as a CPU can run it."""
    detector = small_detector(script)
    features = detector.teacher(random_images(3))
    exact = detector.describe(features)[1]
    monkeypatch.setattr(script, "half_precision",
                        lambda *_: torch.autocast("cpu", torch.bfloat16))
    maps = detector.describe(features)[1]
    assert maps.dtype == detector(features).dtype == torch.float32
    assert not torch.equal(maps, exact)  # else nothing ran in bfloat16
    assert_close(maps, exact, rtol=0, atol=0.04)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cache", [True, False])
@BOTH
def test_a_gpu_agrees_with_the_cpu(script, cache, data, trained, tmp_path, monkeypatch):
    """It trains three more steps and describes the same, but for half precision."""
    normal, test = script.read_dataset(data)
    # Each device draws its dropout for itself.
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    more = {"iters": 5} if script is cada else {"epochs": 2.75}
    found = []
    for device in ("cpu", "cuda"):
        checkpoint = checkpoint_of(trained[script].out)
        settings = {"device": device, "cache": cache, "out": str(tmp_path)}
        cfg = script.Config(**checkpoint["config"] | more | settings)
        detector = script.build(cfg, checkpoint)
        script.train(cfg, detector, normal[:16], checkpoint)
        _, maps = zip(*script.describe_images(cfg, detector, test))
        found.append(torch.cat(maps))
    contrast = found[0].max() - found[0].min()
    assert_close(found[1], found[0], rtol=0, atol=0.02 * contrast.item())


# ==== data ========================================================================================
def draw(path, seed, grain=6, size=(64, 64), mask=None):
    """Write an image of noise, blurred by `grain` pixels. If it gets a mask it has a red hole."""
    width, height = size
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 60, (height, width, 3))
    texture = 128 + (1 + grain) * ndimage.gaussian_filter(noise, (grain, grain, 0))
    if mask:
        row, column = rng.integers(5, 35, 2)
        hole = np.zeros((height, width), bool)
        hole[row:row + 14, column:column + 18] = True
        texture[hole] = (250, 20, 20)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(hole).save(mask)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(texture.clip(0, 255).astype(np.uint8)).save(path)


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
def data(session_path):
    """MVTec-style: two classes, smooth and grainy, 10 training and 3 + 3 test images of each."""
    for cls, grain, size in (("a", 6, (64, 64)), ("b", 0, (80, 64))):
        root = session_path / "data" / cls
        for i in range(10):
            draw(root / f"train/good/{i:03}.png", 50 + i, grain, size)
        for i in range(3):
            draw(root / f"test/good/{i:03}.png", 10 + i, grain, size)
            mask = root / f"ground_truth/hole/{i:03}_mask.png"
            draw(root / f"test/hole/{i:03}.png", 20 + i, grain, size, mask)
    return session_path / "data"


@pytest.fixture
def tree(data, tmp_path):
    """A copy of the data set that a test may spoil."""
    return shutil.copytree(data, tmp_path / "tree")


def spoil(tree, command):
    """Run a command of bash in a data set."""
    subprocess.run([shutil.which("bash"), "-c", command], check=True, cwd=tree)


ONLY_TRAINING = "rm -r ?/test ?/ground_truth"

VISA = """object,split,label,image,mask
pcb,train,normal,pcb/Data/Images/Normal/0.JPG,
pcb,test,Normal,pcb/Data/Images/Normal/1.JPG,
pcb,test,anomaly,pcb/Data/Images/Anomaly/0.JPG,pcb/Data/Masks/Anomaly/0.png
pcb,test,anomaly,pcb/Data/Images/Anomaly/1.JPG,pcb/Data/Masks/Anomaly/1.png
"""


@pytest.fixture
def visa(tmp_path):
    """Raw VisA, one class: a training, a good and two defective images, one with a lost mask."""
    root = tmp_path / "visa"
    for name in ("Normal/0.JPG", "Normal/1.JPG", "Anomaly/0.JPG", "Anomaly/1.JPG"):
        draw(root / "pcb/Data/Images" / name, 0, size=(80, 48))
    values = np.zeros((2, 48, 80), np.uint8)
    values[0, 10:20, 20:60] = 1
    values[0, 20:30, 20:60] = 9
    values[1, 1, 2] = 1
    masks = root / "pcb/Data/Masks/Anomaly"
    masks.mkdir(parents=True)
    for i, mask in enumerate(values):
        Image.fromarray(mask).save(masks / f"{i}.png")
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
    ("cut-out.png", np.dstack([COLOURS, GREY]), COLOURS * (GREY[..., None] / 255)),
    ("palette.gif", PHOTO.quantize(), COLOURS),
    ("phone.mpo", PHOTO, COLOURS),
    ("turned.png", PHOTO, np.rot90(COLOURS, -1)),
    ("12-of-16-bits.png", GREY.astype(np.uint16) * 16, "nearly black"),
    ("32-bit.tif", GREY.astype(np.int32) * 2**20, "32 bits"),
    ("pages.tif", PHOTO, "several frames"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_any_image_is_read_as_rgb(name, image, expected, tmp_path):
    """Sixteen bits, a turned camera, palettes and the two pictures of a phone are understood,
    and no colour hides in what is transparent. Where it is not sure what is white, or which frame
    is meant, an error asks."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    more = {"exif": TURNED} if "turned" in name else {}
    if name in ("pages.tif", "phone.mpo"):
        more = {"save_all": True, "append_images": [image.rotate(180)]}
    image.save(tmp_path / name, **more)
    if isinstance(expected, str):
        with pytest.raises(cada.UserError, match=f"{name}.*{expected}"):
            cada.load_image(tmp_path / name)
    else:
        found = np.asarray(cada.load_image(tmp_path / name))
        lossy = 0 if name in ("grey-16-bit.png", "turned.png") else 3
        assert np.abs(found - expected.astype(float)).mean() <= lossy


DISC = np.hypot(*np.mgrid[-20:20, -20:20]) < 9  # the defect
WHITE = DISC.astype(np.uint8) * 255


HALVES = DISC * np.where(np.arange(40) < 20, 64, 128).astype(np.uint8)  # in two shades


PALETTE = Image.fromarray(np.dstack([HALVES, 0 * HALVES, 0 * HALVES])).quantize()


@pytest.mark.parametrize("name, mask", [
    ("numbers.png", Image.fromarray(WHITE // 200)),
    ("lossy-16-bit.png", Image.fromarray(ndimage.gaussian_filter(WHITE * np.uint16(257), 2))),
    ("drawn-on-nothing.png", Image.fromarray(np.dstack([255 + 0 * WHITE] * 3 + [WHITE]))),
    ("palette.png", PALETTE),
    ("palette-on-nothing.png", PALETTE),
    ("lossy.jpg", Image.fromarray(ndimage.gaussian_filter(WHITE, 2))),
], ids=lambda value: value if isinstance(value, str) else "")
def test_any_mask_is_read_as_black_and_white(name, mask, tmp_path):
    """Numbers, transparency, palettes, blur and JPEG are understood."""
    more = {"transparency": mask.getpixel((0, 0))} if "palette-on" in name else {}
    mask.save(tmp_path / name, **more)
    wrong = np.asarray(cada.load_mask(tmp_path / name)) != DISC
    error = 0.05 if name.startswith("lossy") else 0  # a share of the area
    assert wrong.sum() <= error * DISC.sum()


def test_reads_an_mvtec_tree(tree):
    """Names pair masks, good images may have one, and one class is a data set too."""
    spoil(tree, "mv a/ground_truth/hole/000_mask.png a/ground_truth/hole/000.png;"
                "mv a/ground_truth/hole/002_mask.png a/ground_truth/hole/0_mask.png;"
                "mv a/test/hole/002.png a/test/hole/0.PNG;"
                "cp -r b/ground_truth/hole b/ground_truth/good;"
                "for i in a/*/*; do echo > $i/._001.png; echo > $i/Thumbs.db; done")
    train, test = cada.read_dataset(tree)
    assert [s.cls for s in train] == ["a"] * 10 + ["b"] * 10
    assert [s.label for s in test] == [0, 0, 0, 1, 1, 1] * 2
    assert not any(s.label or s.mask for s in train)
    pairs = [(s.path.name, s.mask.name) for s in test[3:6]]
    assert pairs == [("0.PNG", "0_mask.png"), ("000.png", "000.png"), ("001.png", "001_mask.png")]
    assert test[6].mask.parts[-2:] == ("good", "000_mask.png")
    train, test = cada.read_dataset(tree / "b")
    assert {s.cls for s in train + test} == {"b"}


def test_reads_a_raw_visa_tree(visa, tmp_path, capsys):
    """A mask is binarised, then resized. A defect that is lost by this is still one by label."""
    train, test = cada.read_visa(visa)
    assert [s.label for s in train + test] == [0, 0, 1, 1]
    assert test[0].cls == "pcb"
    maps = torch.zeros(3, 40, 40)
    maps[1, 8:25, 10:30] = 1  # rows 10-29 of 48 and columns 20-59 of 80, whatever their value
    scale = {"thresholds": {"cada": 0.5}, "losses": {}}
    cfg = cada.Config(out=str(tmp_path))
    cada.report(cfg, test, 40, [("cada", maps)], "cada", scale)
    assert "1 masks are empty at 40 x 40" in capsys.readouterr().err
    found = results_of(tmp_path)["cada"]["pcb"]
    assert found["P-F1max"] == 1  # these pixels are marked and no others
    assert found["I-AUROC"] == 0.75  # of the two defects the second is as high as the good image


def test_another_list_than_visas_is_refused(visa):
    """The message names the file."""
    (visa / "split_csv/1cls.csv").write_text(VISA.replace("train", "training"))
    with pytest.raises(cada.UserError, match="split_csv/1cls.csv: "):
        cada.read_dataset(visa)


CLEAN = ("{tree}: 20 training and 12 test images, 6 of them defective, 6 masks; "
         "0 files not used\n")
MESSY_DATA = [  # (what is done to the data set, what must be printed of it)
    ("mkdir a/test/.ipynb; cp a/test/hole/* a/test/.ipynb", CLEAN),
    ("mv a/test/good a/test/OK; mv b/test/good b/test/Normal; mv a/train/good a/train/ok", CLEAN),
    ("mv a ../elsewhere; ln -s ../elsewhere a", CLEAN),
    ("ln -s .. up; ln -s . b/loop; ln -s ../.. a/train/good/up", CLEAN),
    ("touch a/train/good/000.heic", "; 1 files not used {tree}/a/train/good/000.heic\n"),
]


@pytest.mark.parametrize("command, says", MESSY_DATA)
def test_what_was_found_is_told(command, says, tree, capsys):
    """Before the training, in one line. Hidden folders and known names of the good ones are no
    kinds of defects; links to folders above end."""
    spoil(tree, command)
    cada.read_dataset(tree)
    assert says.format(tree=tree) in capsys.readouterr().err


# ==== the scripts as a user runs them =============================================================
VARIANTS = {cada: ["raw", "oracle", "regress", "cada"], cnc: ["cnc"]}


def scores_of(out):
    """The rows of scores.csv."""
    with open(out / "scores.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def results_of(out):
    """The metrics in metrics.json."""
    return json.loads((out / "metrics.json").read_text())["results"]


def checkpoint_of(out):
    """The content of checkpoint.pt."""
    return torch.load(out / "checkpoint.pt", weights_only=True)


def in_forks(target, *calls):
    """Run a function with these arguments, all at once, in copies of this process: exit codes."""
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=target, args=arguments) for arguments in calls]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(100)
    return [job.exitcode for job in jobs]  # negative after a signal


def files_in(folder):
    """What a run has left there, at any depth: {name: content}."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_numbers(out, script):
    """The scores in scores.csv, (images, variants)."""
    return np.array([[float(row[name]) for name in VARIANTS[script]] for row in scores_of(out)])


def test_defaults_are_the_published_ones(visa):
    """They are small on the demo set, and a flag goes before everything."""
    published = {
        cada: {"teacher": "wide_resnet50_2", "weights": "IMAGENET1K_V1", "image_size": 256,
               "batch_size": 16, "iters": 5000, "lr": 2e-3},
        cnc: {"teacher": "ViT-L-14-336-quickgelu", "weights": "openai", "image_size": 336,
              "batch_size": 8, "epochs": 250, "lr": 1e-3, "theta": 5, "tau": 0.001, "experts": 5,
              "top_k": 2, "fnp": True, "constraint": True},
    }
    for script, expected in published.items():
        cfg, _ = script.read_command_line(["--data", str(visa)])
        assert expected.items() <= vars(cfg).items()
        cfg, _ = script.read_command_line(["--data", str(DEMO), "--lr", "0.5"])
        assert (script.DEMO | {"lr": 0.5}).items() <= vars(cfg).items()


# A cluster sets these for purposes of its own, and a notebook names a backend that may be missing.
SURROUNDINGS = {"RANK": "1", "WORLD_SIZE": "2", "MPLBACKEND": "module://nowhere",
                "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session", autouse=True)
def jobs(data, session_path):
    """Start a training of each script from the shell. They run beside the first tests."""
    found = {}
    for script in (cada, cnc):
        name = script.__name__
        command = [sys.executable, f"{name}.py", "--data", data, "--out", session_path / name]
        found[script] = subprocess.Popen(
            command + FLAGS[script] + STEPS[script], cwd=HERE, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=os.environ | SURROUNDINGS)
    yield found
    for job in found.values():
        job.kill()
        job.communicate()


@pytest.fixture(scope="session")
def trained(jobs, session_path):
    """What these trainings have left: their folder, and what they printed."""
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
    """Metrics are those of the written scores, and the table shows them; in any SURROUNDINGS."""
    done = trained[script]
    assert {"checkpoint.pt", "metrics.json", "scores.csv", "heatmaps.png"} <= done.files
    labels = [int(row["label"]) for row in scores_of(done.out)]
    results = results_of(done.out)
    assert list(results) == VARIANTS[script]
    for variant, scores in zip(results, as_numbers(done.out, script).T):
        found = results[variant]
        assert list(found) == ["a", "b", "class mean", "pooled"]
        classes = [roc_auc_score(labels[:6], part) for part in (scores[:6], scores[6:])]
        assert found["class mean"]["I-AUROC"] == pytest.approx(np.mean(classes))
        assert found["pooled"]["I-AUROC"] == pytest.approx(roc_auc_score(labels, scores))
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
    assert capsys.readouterr().out.replace(str(tmp_path), str(done.out)) == done.stdout
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
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == len(files_in(tmp_path)) == 7
    for told in found:
        row = rows[told["path"]]
        assert told["score"] == pytest.approx(float(row[script.__name__]), abs=1e-4)
        assert str(told["anomalous"]) == row["anomalous"]
        assert Image.open(told["overlay"]).size == Image.open(told["path"]).size


def test_predict_takes_the_images_of_a_folder(data, trained, tmp_path, capsys):
    """It counts other files. Long names are cut, and links to folders above end."""
    folder = shutil.copytree(data / "a/test/good", tmp_path / "images")
    (folder / "000.png").rename(folder / f"{'x' * 250}.png")
    (folder / "photo.heic").touch()
    (folder / "up").symlink_to("..")
    words = ["--checkpoint", trained[cada].checkpoint, "--out", tmp_path]
    assert run(cada, "predict", folder, *words) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3
    assert "3 images; 1 files not used" in printed.err


@pytest.mark.parametrize("stdout", [None, io.StringIO()], ids=["closed", "notebook"])
def test_any_output_will_do(stdout, data, trained, tmp_path, monkeypatch):
    """As a script, with an output that is closed, or not like a file."""
    words = ["predict", data / "a/test/good/000.png", "--checkpoint", trained[cada].checkpoint]
    monkeypatch.setattr(sys, "argv", ["cada.py", *map(str, words), "--out", str(tmp_path)])
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(HERE / "cada.py"), run_name="__main__")
    assert set(files_in(tmp_path)) == {"0000-000.png"}


def die_after_the_first_checkpoint(script, words):
    """Run a command line, and kill this process as soon as a checkpoint is written."""
    save = script.save_checkpoint

    def save_and_die(*arguments):
        save(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    script.save_checkpoint = save_and_die
    script.main(words)


@FORKS
@BOTH
def test_a_killed_run_goes_on(script, tree, trained, tmp_path, capsys):
    """It ends as if nothing had happened, to the last bit: neither --no-cache nor the names of
    classes change a score. (A batch of another size may be rounded differently, but 16 training
    images fill their batches of 4.) The kill leaves no cache behind. A $ is drawn as text."""
    (tree / "a").rename(tree / r"$\cost_$")
    out = tmp_path / "out"
    words = ["--data", str(tree), "--out", str(out), *FLAGS[script], *STEPS[script]]
    assert in_forks(die_after_the_first_checkpoint, (script, words)) == [-signal.SIGKILL]
    assert list(files_in(out)) == ["checkpoint.pt"]
    assert run(script, "eval", "--out", out) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(script, "--resume", "--no-cache", "--out", out) == 0
    told = capsys.readouterr().err
    assert re.search(r"--resume: seed 0, step 1 of (2|8)", told)
    assert re.search(r"pt: step (2|8), loss \d.\d{4}, thresholds none yet; --resume", told)
    assert "1" in json.loads((out / "metrics.json").read_text())["losses"]
    unbroken = trained[script].out
    np.testing.assert_array_equal(as_numbers(out, script), as_numbers(unbroken, script))
    last = VARIANTS[script][-1]
    assert results_of(out)[last]["pooled"] == results_of(unbroken)[last]["pooled"]


def test_resume_wants_the_same_images(tree, trained, tmp_path, capsys):
    """It may train longer and elsewhere; eval takes any set. But with one image more, some that
    were held out for the threshold might be trained on."""
    out = tmp_path / "out"
    words = ["--resume", "--checkpoint", trained[cada].checkpoint, "--out", out, "--data", tree]
    assert run(cada, *words, "--iters", 3) == 0
    checkpoint = checkpoint_of(out)
    assert checkpoint["step"] == checkpoint["config"]["iters"] == 3
    assert run(cada, "eval", "--out", out, "--data", tree / "b") == 0
    assert {row["class"] for row in scores_of(out)} == {"b"}

    for command in ("cp a/train/good/000.png a/train/good/010.png",
                    "rm a/train/good/010.png; mv b c"):  # another class, with files of equal names
        spoil(tree, command)
        assert run(cada, *words, "--iters", 4) == 2
        assert "not the images of the checkpoint" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("later, code, says", [(math.nan, 2, "lower --lr"),
                                               (KeyboardInterrupt, 130, "interrupted")])
def test_a_training_that_diverges_keeps_its_last_checkpoint(later, code, says, data, tmp_path,
                                                            monkeypatch, capsys):
    """Or is interrupted, here in the second step: the checkpoint of the first stays."""
    forward = cnc.CNC.forward
    factor = Mock(side_effect=[1] + 9 * [later])
    monkeypatch.setattr(cnc.CNC, "forward",
                        lambda *args, **more: factor() * forward(*args, **more))
    assert run(cnc, "--data", data, "--out", tmp_path, *FLAGS[cnc]) == code
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert list(files_in(tmp_path)) == ["checkpoint.pt"]
    assert checkpoint_of(tmp_path)["step"] == 1
    factor.side_effect = 10 * [later]
    assert run(cnc, "--data", data, "--out", tmp_path, *FLAGS[cnc]) == code
    assert f"{tmp_path}: holds another training" in capsys.readouterr().err


def test_threshold_comes_from_images_kept_back(data, trained, capsys):
    """It is the 297th of 299 scores; of few, as of the four here, the largest. With
    --holdout 0 all images serve for both."""
    assert cada.conformal_threshold(torch.arange(299.0)) == 296
    checkpoint = checkpoint_of(trained[cnc].out)
    cfg = cnc.Config(**checkpoint["config"])
    normal, _ = cnc.read_dataset(data)
    used, held = cnc.hold_out(cfg, normal, checkpoint)
    everything = list(range(20))
    assert sorted(used + held) == everything
    assert "threshold: from 4 normal images" in capsys.readouterr().err
    detector = cnc.build(cfg, checkpoint)
    _, maps = zip(*cnc.describe_images(cfg, detector, normal))
    scores = cnc.image_score(cnc.smooth(torch.cat(maps)))
    highest = scores[held].max().item()
    assert checkpoint["thresholds"]["cnc"] == pytest.approx(highest, rel=1e-4)
    assert cnc.hold_out(cnc.Config(holdout=0.0), normal, None) == (everything, everything)


@BOTH
def test_good_images_and_a_teacher_from_a_file(script, tree, tmp_path, monkeypatch, capsys):
    """Good images are enough to train and predict. A teacher's weights are read from their file
    each time; the checkpoint knows their fingerprint."""
    def write_weights(seed):
        torch.manual_seed(seed)
        resnet = torchvision.models.resnet18(num_classes=7)
        model = resnet if script is cada else cnc.tiny_clip(64)
        torch.save(model.state_dict(), tmp_path / "weights.pt")

    spoil(tree, ONLY_TRAINING)
    monkeypatch.chdir(tmp_path)
    write_weights(5)
    words = ["--data", "tree", "--out", "out", *FLAGS[script], "--weights", "weights.pt"]
    assert run(script, *words) == 0
    printed = capsys.readouterr()
    assert not printed.out
    assert "RANDOM" not in printed.err
    threshold = checkpoint_of(Path("out"))["thresholds"][script.__name__]
    assert f"'{script.__name__}': {threshold}" in printed.err.splitlines()[-1]
    assert list(files_in(Path("out"))) == ["checkpoint.pt"]
    assert "teacher" not in checkpoint_of(Path("out"))["weights"]

    # Another network is noticed.
    words = ["predict", "tree/a/train/good/000.png", "--out", "out"]
    assert run(script, *words) == 0
    write_weights(6)
    for more in ([], ["--weights", "none"]):
        assert run(script, *words, *more) == 2
        assert "--weights: not the teacher" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command, metrics", [
    ("rm -r ?/ground_truth", ["I-AUROC", "I-AP", "I-F1max"]),
    ("rm -r ?/test/hole ?/ground_truth", []),
    ("rm -r ?/test/good ?/ground_truth", []),
])
def test_data_may_lack_masks_or_a_kind_of_images(command, metrics, tree, trained, tmp_path, capsys):
    """Then some metrics are missing, and all else is told. Of an unknown class there is no oracle.
    """
    spoil(tree, f"{command}; mv a new")
    words = ["--checkpoint", trained[cada].checkpoint, "--data", tree, "--out", tmp_path]
    assert run(cada, "eval", *words) == 0
    results = results_of(tmp_path)
    assert list(results) == ["raw", "regress", "cada"]
    assert list(results["cada"]["pooled"]) == metrics
    printed, error = capsys.readouterr()
    assert ("no table" in printed) != bool(metrics)
    assert "no rows of the oracle: it has not seen new" in error
    told = [row["anomalous"] for row in scores_of(tmp_path)]
    good, bad = re.search(r"flags (\d+) of \d+ good and (\d+) of", printed).groups()
    assert int(good) + int(bad) == told.count("True")


def test_cada_on_cnc(data, trained, tmp_path, monkeypatch, capsys):
    """CADA is fitted to a CNC that stays as it is. Its checkpoint needs no other file, and it has a
    folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("cnc.pt").write_bytes(trained[cnc].checkpoint.read_bytes())
    assert run(cada, "--cnc", "cnc.pt", "--data", data) == 0
    Path("cnc.pt").unlink()
    out = Path("runs/cada-on-cnc")
    assert set(files_in(tmp_path)) == trained[cada].files
    scores = as_numbers(out, cada)
    assert_close(scores[:, :1], as_numbers(trained[cnc].out, cnc), rtol=0, atol=1e-4)
    assert run(cada, "eval", "--out", out) == 0
    np.testing.assert_array_equal(as_numbers(out, cada), scores)
    capsys.readouterr()
    assert run(cada, "predict", data / "a/test/hole/000.png", "--out", out) == 0
    score = json.loads(capsys.readouterr().out)["score"]
    assert score == pytest.approx(scores[3, -1], abs=1e-3)


def train_a_share(script, words, rank, count, port):
    """What one of torchrun's `count` processes does. Left out is all in which a half of the images
    differs from all of them: BatchNorm, dropout and the balance of experts."""
    script.UNDER_TORCHRUN = True
    script.RANK = rank
    script.WORLD_SIZE = count
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.nn.BatchNorm2d.forward = lambda self, x: F.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias)
    torch.nn.Dropout.forward = lambda self, x: x
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
    """Each sees a half of every batch, of all 20 images, and follows the mean of the gradients."""
    spoil(tree, ONLY_TRAINING)
    words = ["--data", str(tree), *FLAGS[script], "--batch-size", "20", "--holdout", "0", "--out"]
    if script is cnc:
        words = ["--no-fnp", "--tau", "1", *words]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # a free one
    calls = []
    for count, rank in ((1, 0), (2, 0), (2, 1)):
        calls.append((script, [*words, str(tmp_path / str(count))], rank, count, port))
    assert in_forks(train_a_share, *calls) == [0, 0, 0]

    students = [small_detector(script).student.state_dict()]
    for count in ("1", "2"):
        students.append(checkpoint_of(tmp_path / count)["weights"]["student"])
    start, one, two = (torch.cat([w.flatten() for w in s.values()]) for s in students)
    assert (two - one).norm() < 1e-3 * (one - start).norm()


# ==== what the README says ========================================================================
README = (HERE / "README.md").read_text(encoding="utf-8")
SOURCES = [(HERE / name).read_text(encoding="utf-8") for name in ("cada.py", "cnc.py")]


def test_readme_lists_every_departure():
    """Its list is that of the tags [ours] Dn in the code, without a gap; links lead to files."""
    tags = re.findall(r"\[ours\]((?:[\s#,]+D\d+)*)", SOURCES[0] + SOURCES[1])
    assert tags.count("") == 2  # each docstring explains the tag itself once
    in_code = set(re.findall(r"D\d+", " ".join(tags)))
    listed = re.findall(r"^(?:- \*\*|\|\s*)(D\d+)\b", README, re.M)
    assert sorted(listed) == sorted(in_code)
    assert in_code == {f"D{i + 1}" for i in range(len(in_code))}
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (HERE / link).exists(), link


def test_every_command_of_the_readme_runs(data, tmp_path, monkeypatch, capsys):
    """Flags after those of the README, which go before them, make it small; so does the data."""
    for name in ("mvtec", "visa", "elpv", "mine"):
        shutil.copytree(data / "b", tmp_path / "data" / name / "bottle")
    shutil.copytree(data / "b/test/good", tmp_path / "folder")
    PHOTO.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cada.Figure, "savefig", Mock())  # slow, and drawn in other tests

    commands = re.findall(r"^ *python (cada|cnc)\.py (.+)$", README, re.M)
    assert len(commands) >= 6
    for name, text in commands:
        script = {"cada": cada, "cnc": cnc}[name]
        words = shlex.split(text, comments=True)
        if not {"eval", "predict", "--resume", "--cnc"} & set(words):
            words += FLAGS[script]
        assert run(script, *words) == 0, text
    assert "overlay" in capsys.readouterr().out


def test_the_readmes_own_detector_is_aligned(tmp_path, monkeypatch, capsys):
    """Its block of Python runs, word for word, and CADA helps there; on a part of the demo set."""
    odd = shutil.ignore_patterns("*[13579]*")
    shutil.copytree(DEMO, tmp_path / "data/demo", ignore=odd)
    monkeypatch.chdir(tmp_path)
    exec(README.split("```python\n")[1].split("```")[0], {})
    raw, aligned = map(float, capsys.readouterr().out.split())
    assert aligned > raw + 0.05


def test_scripts_share_sections_letter_for_letter():
    """What both scripts need stands in both, since each is to be read on its own."""
    banner = re.compile(r"^# ==== shared: (.+?)\n(.*?)^# ==== end shared$", re.M | re.S)
    ours, theirs = (banner.findall(source) for source in SOURCES)
    assert len(ours) == SOURCES[0].count("==== end shared") >= 6
    for one, other in zip(ours, theirs, strict=True):
        assert one == other, one[0]
    assert "import cada" not in SOURCES[1]


# ==== bad input ===================================================================================
def check_failure(script, words, says, capsys, tmp_path):
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
        error = error.splitlines()[-1]
        assert error.startswith(f"{script.__name__}.py: error: ")
    assert says in error  # in ours, or in tyro's frame
    assert files_in(out) == before


BAD_COMMAND_LINES = [  # (script, command line, what the message must say)
    (cada, "--itres 3", "--iters"),
    (cada, "predict --checkpoint {cada}", "name images after predict"),
    (cada, "{train} --image-size 100", "--image-size: give a multiple of 32"),
    (cada, "{train} --checkpoint {cada}", "--checkpoint"),
    (cada, "{train} --iters 0", "--iters: give at least 1"),
    (cada, "{train} --holdout 1", "--holdout: give 0 or more"),
    (cada, "{train} --data nowhere", "nowhere: no such folder"),
    (cada, "{train} --teacher squeezenet1_0", "--teacher squeezenet1_0"),
    (cada, "{train} --weights {malicious}", "malicious.pt"),
    (cada, "--cnc {cnc} --data {other}", "not the images of the checkpoint"),
    (cada, "eval --checkpoint nowhere.pt", "nowhere.pt: no checkpoint of cada.py"),
    (cada, "eval --checkpoint {cnc}", "cnc.py (format 2) wrote it"),
    (cada, "eval --checkpoint {cada} --data {empty}", "{empty}: no test images"),
    (cada, "eval --checkpoint {cada} --iters 5", "--iters: the checkpoint has 2"),
    (cada, "predict {other} --checkpoint {cada} --no-cache", "--cache: the checkpoint has True"),
    (cada, "--resume --checkpoint {cada} --seed 1", "--seed: the checkpoint"),
    (cada, "--resume --checkpoint {cada} --iters 1 --data {data}", "trained for longer"),
    (cada, "--cnc {cnc} --data {data} --iters 7", "--iters: the checkpoint has 8"),
    (cada, "--cnc {tmp}/out/cnc.pt --data {data}", "--out: give another folder than CNC's"),
    (cada, "eval --checkpoint {old}", "another version wrote it"),
    (cada, "eval --checkpoint {part} --data {data}", "the checkpoint is of another version"),
    (cada, "predict {empty} --checkpoint {cada}", "no image to score in {empty}"),
    (cada, "predict {other} {broken} --checkpoint {cada}", "cannot read image {broken}"),
    (cnc, "{train} --top-k 6", "--top-k"),
    (cnc, "{train} --theta 2", "--theta"),
    (cnc, "{train} --image-size 70", "multiples of 16"),
    (cnc, "{train} --weights {malicious}", "malicious.pt"),
    (cnc, "{train} --teacher RN50", "plain ViT"),
    (cnc, "eval --checkpoint {cnc} --no-fnp", "--fnp: the checkpoint has True"),
]


class Payload:
    """Who unpickles it creates a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("script, text, says", BAD_COMMAND_LINES)
def test_bad_command_lines(script, text, says, data, trained, tmp_path, on_meta, capsys):
    """A malicious checkpoint is one that would run code if it were unpickled."""
    ran = tmp_path / "ran"
    malicious = pickle.dumps({"config": Payload(ran)}, protocol=2)
    (tmp_path / "malicious.pt").write_bytes(malicious)
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    torch.save({"script": "cada.py"}, tmp_path / "old.pt")
    if "{part}" in text:  # large
        part = checkpoint_of(trained[cada].out)
        part["weights"]["student"].popitem()
        torch.save(part, tmp_path / "part.pt")
    places = {path.stem: path for path in tmp_path.iterdir()} | {"tmp": tmp_path}
    (tmp_path / "out").mkdir()
    shutil.copy(trained[cnc].checkpoint, tmp_path / "out/cnc.pt")
    places |= {"data": data, "other": data / "a", "cada": trained[cada].checkpoint,
               "cnc": trained[cnc].checkpoint, "train": f"--data {data} {' '.join(FLAGS[script])}"}
    words = text.format(**places).split()
    check_failure(script, words, says.format(**places), capsys, tmp_path)
    assert not ran.exists()
    pickle.loads(malicious)
    assert ran.exists()  # so the payload works


@pytest.mark.parametrize("text", ["eval --checkpoint {cada} --batch-size 3", "{train}"])
def test_bad_calls_of_torchrun(text, data, trained, tmp_path, monkeypatch, capsys):
    """Evaluation is one process's work, and each process needs the same part of a batch."""
    monkeypatch.setattr(cada, "UNDER_TORCHRUN", True)
    monkeypatch.setattr(cada, "WORLD_SIZE", 3)
    text = text.format(cada=trained[cada].checkpoint, train=" ".join(FLAGS[cada]))
    says = "torchrun: is for training, --batch-size a multiple of 3"
    check_failure(cada, [*text.split(), "--data", data], says, capsys, tmp_path)


BAD_DATA = [  # (what is done to the data set, what the message must say)
    ("mv a/train/good a/train/deep; mkdir a/train/good; mv a/train/deep a/train/good",
     "classes without: ['a']"),
    ("rm ?/train/good/00[1-9].png", "2 training images"),
    ("echo text > a/train/good/003.png", "good/003.png"),
    ("truncate --size 600 ?/test/hole/00?.png", "6 in all"),
    ("echo text > a/ground_truth/hole/001_mask.png", "hole/001_mask.png"),
    ("cp b/test/good/000.png a/ground_truth/hole/001_mask.png", "001_mask.png: its image has"),
    ("cp turned.png a/test/hole/001.png", "001_mask.png: its image has another size, or is turned"),
    ("rm a/ground_truth/hole/001_mask.png", "hole/001.png: no mask in ground_truth/hole"),
    ("cp a/ground_truth/hole/00?_mask.png a/ground_truth", "ground_truth/000_mask.png: not the"),
    ("cp a/ground_truth/hole/001_mask.png a/ground_truth/hole/009.png", "hole/009.png: not the"),
    ("for i in a b; do mv $i/test $i/test_public; mv $i/ground_truth $i/test_public; done",
     "ground_truth/hole/000_mask.png: not the mask"),
    ("cp a/ground_truth/hole/000_mask.png a/test/hole", "test/hole/000_mask.png shares its name"),
    ("cp a/ground_truth/hole/000_mask.png a/ground_truth/hole/000.png", "shares its name"),
]


@pytest.mark.parametrize("command, says", BAD_DATA)
def test_bad_data(command, says, tree, tmp_path, capsys):
    """A broken data set stops the run before the training; the message names the file."""
    Image.new("RGB", (64, 64), "grey").save(tree / "turned.png", exif=TURNED)
    spoil(tree, command)
    check_failure(cada, ["--data", tree, *FLAGS[cada]], says, capsys, tmp_path)


@FORKS
@pytest.mark.parametrize("flag, says", [("--cache", "File too large"), ("--no-cache", "room in")])
def test_a_full_disk(flag, says, data, tmp_path, capsys):
    """Here no file may be larger than 100 kB. One line says so, and no part of a file is left."""
    import resource  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        check_failure(cada, ["--data", data, *FLAGS[cada], flag], says, capsys, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_script_on_its_own(data, trained, tmp_path, monkeypatch, capsys):
    """The demo set need not lie beside it. A copy of another name reads the same checkpoints."""
    copy = shutil.copy(HERE / "cada.py", tmp_path / "my_cada.py")
    mine = SimpleNamespace(**runpy.run_path(str(copy), run_name="my_cada"))
    assert mine.read_checkpoint(trained[cada].checkpoint, mine.WRITER)
    monkeypatch.setattr(cada, "HERE", tmp_path)
    check_failure(cada, [], "data/demo: no such folder", capsys, tmp_path)


@pytest.mark.parametrize("script, weights", [
    (cada, "--weights IMAGENET1K_V1"),
    (cnc, "--weights openai --teacher ViT-B-32-quickgelu --image-size 224"),
])
def test_no_network(script, weights, data, tmp_path, monkeypatch, capsys):
    """The message names the weights and the way without them."""
    download = Mock(side_effect=URLError("Name or service not known"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # what was downloaded before must not help
    monkeypatch.setattr(torch.hub, "urlopen", download)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    words = ["--data", data, *FLAGS[script], *weights.split()]
    check_failure(script, words, "Name or service not known", capsys, tmp_path)


# ==== a text that means something: python test_smoke.py text ======================================
def text_shift(detector, tokens, covered):
    """Tokens of a teacher that understands "damaged": in joint space each patch moves along
    t_a - t_n, by noise of 0.06 of its length, and patches of which a defect covers a tenth by 0.12
    more."""
    t_n, t_a = detector.prompts.start[0]
    along = F.normalize(t_a - t_n, dim=0) @ detector.teacher.clip.visual.proj.T
    patches = tokens[:, :, 1:]
    noise = torch.randn(patches.shape[:3], generator=torch.Generator().manual_seed(0))
    share = 0.06 * noise + 0.12 * (covered > 0.1)
    patches = patches + (share * patches.norm(dim=-1))[..., None] * along
    return torch.cat([tokens[:, :, :1], patches], dim=2)


def compare_with_and_without_text():
    """What is a text worth that means something? A trained CLIP was not run."""
    for text in (True, False):
        found = learn_a_part_of_the_demo(text_shift, 160, fnp=text, constraint=text)
        print("text:", text, found)


if __name__ == "__main__":
    if sys.argv[1:] != ["text"]:
        sys.exit("pytest -q test_smoke.py runs the tests; python test_smoke.py text a measurement")
    compare_with_and_without_text()
