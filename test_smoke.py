"""Does it do what it says? Run with `pytest -q`: no GPU, no network, no data set needed, two minutes
on two CPU cores. `python test_smoke.py bench` measures instead.

In four parts: the papers' methods, the metrics, the scripts as a user runs them, bad input. Scripts
run on a made data set of two classes, with random teachers at 64 x 64: cada.py a ResNet-18, cnc.py
its tiny CLIP. What both share is tested in cada.py, and that the copies are equal.
"""
import csv
import importlib.util
import inspect
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
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
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch.utils.flop_counter import FlopCounterMode

import cada
import cnc

HERE = Path(__file__).resolve().parent
DEMO = HERE / "data/demo"
FLAGS = {cada: ("--image-size 64 --teacher resnet18 --weights none --iters 4 --batch-size 4 "
                "--holdout 0.15 --workers 0 --device cpu").split(),
         cnc: ("--image-size 64 --teacher tiny --weights none --epochs 2 --theta 1 --batch-size 4 "
               "--holdout 0.15 --workers 0 --device cpu").split()}
TINY = {cada: dict(image_size=64, teacher="resnet18", weights="none", device="cpu", workers=0),
        cnc: dict(image_size=64, teacher="tiny", weights="none", device="cpu", workers=0)}
BOTH = pytest.mark.parametrize("script", [cada, cnc], ids=["cada", "cnc"])
torch.set_num_threads(1)  # the tensors are so small that a second thread costs more than it gains


# ---- helpers -------------------------------------------------------------------------------------
def draw(rng, kind: str, size: tuple[int, int], hole: bool) -> tuple[Image.Image, Image.Image]:
    """A small image, smooth (kind "a") or grainy ("b"), and its mask; `hole` punches a defect."""
    pixels = rng.normal(0, 60, (size[1], size[0], 3))
    if kind == "a":
        pixels = 8 * ndimage.gaussian_filter(pixels, (6, 6, 0))
    image = Image.fromarray((128 + pixels).clip(0, 255).astype(np.uint8))
    mask = Image.new("L", size)
    if hole:
        x, y = (int(rng.integers(5, s - 25)) for s in size)
        ImageDraw.Draw(image).ellipse((x, y, x + 18, y + 14), fill=(250, 20, 20))
        ImageDraw.Draw(mask).ellipse((x, y, x + 18, y + 14), fill=255)
    return image, mask


def save(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


SAVEFIG, SAVE = Figure.savefig, torch.save


def run(script, *words) -> int:
    """The command line, in this process; but without what takes longer than all the rest: drawing
    the pictures, and saving checkpoints before the end of the training."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Figure, "savefig", lambda self, path, **more: path.write_bytes(b"picture"))
        if torch.save is SAVE:  # else a test has put in another
            m.setattr(torch, "save", lambda content, path: SAVE(
                content if "thresholds" in content else {}, path))
        return script.main([str(w) for w in words])


def rows_of(out: Path) -> list[dict]:
    with open(out / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def numbers(out: Path, *names: str) -> np.ndarray:
    """Columns of scores.csv as (rows, columns)."""
    return np.array([[float(row[name]) for name in names] for row in rows_of(out)])


def results(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())["results"]


def listing(folder: Path) -> dict[str, int]:
    """The files below a folder with their sizes; {} for a folder that is not there."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def auroc(scores, labels, classes=None) -> float:
    """Pooled AUROC, or with `classes` the mean over classes."""
    if classes is None:
        return roc_auc_score(labels, scores)
    return np.mean([roc_auc_score(labels[classes == c], scores[classes == c])
                    for c in np.unique(classes)])


@pytest.fixture
def tmp_path():
    """Instead of pytest's own, which keeps the folders of three sessions: checkpoints are large."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def session_path():
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def data(session_path) -> Path:
    """Two classes, 7 training and 3 + 3 test images each. Tests that spoil it use `tree`."""
    rng, root = np.random.default_rng(0), session_path / "data"
    for kind, size in (("a", (64, 64)), ("b", (80, 64))):
        for part, count in (("train/good", 7), ("test/good", 3), ("test/hole", 3)):
            for i in range(count):
                image, mask = draw(rng, kind, size, part == "test/hole")
                save(image, root / kind / part / f"{i:03}.png")
                if part == "test/hole":
                    save(mask, root / kind / "ground_truth/hole" / f"{i:03}_mask.png")
    return root


@pytest.fixture
def tree(data, tmp_path) -> Path:
    """A copy of the data set that a test may spoil."""
    return Path(shutil.copytree(data, tmp_path / "tree"))


@pytest.fixture(scope="session")
def trained(data, session_path) -> dict:
    """One training run of each script from the shell: its folder and what it printed."""
    def start(script):
        out = session_path / f"trained-{script.__name__}"
        done = subprocess.run(
            [sys.executable, f"{script.__name__}.py", "--data", data, "--out", out, *FLAGS[script]],
            capture_output=True, text=True, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return SimpleNamespace(out=out, checkpoint=out / "checkpoint.pt", stdout=done.stdout,
                               stderr=done.stderr, files=set(listing(out)))

    with ThreadPoolExecutor() as pool:
        return dict(zip((cada, cnc), pool.map(start, (cada, cnc))))


def random_images(n: int, side: int = 64) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def weights_of(module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ==== 1. the papers: RevDist ======================================================================
def millions(*modules) -> float:
    return round(sum(p.numel() for m in modules for p in m.parameters()) / 1e6, 2)


def test_parameters_of_wide_resnet50_2():
    """RD's table; layer4 of the teacher, which nothing reads, is not there."""
    with torch.device("meta"):
        student = cada.Student("wide_resnet50_2")
        teacher = cada.Teacher("wide_resnet50_2", "none", 0)
    parts = (student.bottleneck, student.decode3, student.decode2, student.decode1)
    assert [millions(p) for p in parts] == [48.26, 17.84, 5.32, 1.76]
    assert millions(student.fuse1, student.fuse2) == 10.62 and millions(student) == 83.80
    layers = teacher.layer1, teacher.layer2, teacher.layer3
    assert [millions(layer) for layer in layers] == [0.63, 3.48, 20.74]
    assert millions(teacher) == millions(teacher.stem, *layers)


@pytest.mark.parametrize("name, c1", [("wide_resnet50_2", 256), ("resnet18", 64),
                                      ("resnext50_32x4d", 256)])
def test_shapes_of_revdist(name, c1):
    with torch.device("meta"):
        teacher, student = cada.Teacher(name, "none", 0), cada.Student(name)
        encoded = teacher(torch.empty(2, 3, 256, 256))
    shapes = [(2, c1, 64, 64), (2, 2 * c1, 32, 32), (2, 4 * c1, 16, 16)]
    assert [f.shape for f in encoded] == shapes
    assert [d.shape for d in student([f.float() for f in encoded])] == shapes
    fused = torch.empty(2, 12 * c1, 16, 16, device="meta")
    assert student.bottleneck(fused).shape == (2, 8 * c1, 8, 8)


@pytest.fixture
def revdist() -> cada.RevDist:
    torch.manual_seed(0)
    return cada.RevDist(cada.Config(**TINY[cada]))


def test_gradients_of_revdist_reach_the_student_only(revdist):
    before = weights_of(revdist.teacher)
    revdist.train()
    revdist(revdist.teacher(random_images(4))).backward()
    assert all(p.grad is None and not p.requires_grad for p in revdist.teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in revdist.student.parameters())
    assert same(before, revdist.teacher.state_dict())  # running statistics included


def test_random_resnet_takes_batchnorm_statistics_from_the_images(revdist):
    teacher, batches = revdist.teacher, random_images(6).mul(3).add(1).split(3)
    teacher.estimate_statistics(batches)
    seen = torch.stack([teacher.stem[0](x).mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(teacher.stem[1].running_mean, seen, rtol=1e-3, atol=1e-4)
    before = weights_of(teacher)
    teacher(batches[0])
    assert same(before, teacher.state_dict()) and not teacher.layer1.training  # frozen again


def test_loss_and_map_of_revdist_are_cosine_distances(revdist):
    features = revdist.teacher(random_images(2))
    for sign, distance in ((1, 0.0), (-1, 2.0)):
        revdist.student.forward = lambda encoded, sign=sign: [sign * e for e in encoded]
        assert revdist(features).item() == pytest.approx(3 * distance, abs=1e-4)
        pooled, maps = revdist.describe(features)
        assert pooled.shape == (2, 2 * (64 + 128 + 256)) and maps.shape == (2, 64, 64)
        torch.testing.assert_close(maps, torch.full_like(maps, distance), rtol=0, atol=1e-4)


def test_position_loss_ignores_the_length_of_a_vector_and_flat_loss_does_not(revdist):
    features = revdist.teacher(random_images(2))
    revdist.student.forward = lambda encoded: [
        torch.cat([9 * e[..., :1], e[..., 1:]], dim=-1) for e in encoded]
    assert revdist(features).item() > 0.1
    revdist.cfg.loss = "position"
    assert revdist(features).item() == pytest.approx(0, abs=1e-4)


def test_smoothing_has_sigma_4_at_256_and_commutes_with_normalising():
    point = torch.zeros(1, 256, 256)
    point[0, 128, 128] = 1
    spread = cada.smooth(point)[0].sum(0) @ (torch.arange(256.0) - 128).square()
    assert spread == pytest.approx(16, rel=0.01)
    u, gamma = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.3, 0.9, 1.0])
    maps = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cada.smooth(cada.normalise(maps, u, gamma)),
                               cada.normalise(cada.smooth(maps), u, gamma), rtol=0, atol=1e-4)


def test_image_score_is_the_mean_of_the_top_percent():
    assert cada.image_score(torch.arange(200.0).reshape(1, 10, 20)).tolist() == [198.5]


# ==== 1. the papers: CADA =========================================================================
A, B = np.array([0.05, 0.2, 0.4, 0.1, 0.7]), np.array([0.02, 0.1, 0.05, 0.3, 0.15])


def five_classes(seed: int, per_class: int, anomalous: bool):
    """Features around one centre a class; maps a_c + b_c * noise, anomalous ones with a raised
    patch. Returns features, maps, labels, classes."""
    rng = np.random.default_rng(seed)
    classes = np.repeat(np.arange(5), per_class)
    labels = np.tile(np.arange(per_class) % 2, 5) * anomalous
    centres = np.random.default_rng(0).normal(size=(5, 64))
    features = centres[classes] + 0.3 * rng.normal(size=(len(classes), 64))
    noise = np.abs(rng.normal(size=(len(classes), 32, 32)))
    noise[:, 10:13, 10:13] += 2.5 * labels[:, None, None]
    maps = A[classes][:, None, None] + B[classes][:, None, None] * noise
    return torch.tensor(features).float(), torch.tensor(maps).float(), labels, classes


@pytest.fixture(scope="module")
def fitted() -> cada.CADA:
    return cada.CADA.fit(*five_classes(1, 40, anomalous=False)[:2], seed=0)


def test_cada_undoes_the_distortion_of_each_class(fitted):
    """Nearly as well as one who knows the class, and without harm to the order within a class."""
    _, normal_maps, _, of_class = five_classes(1, 40, anomalous=False)
    features, maps, labels, classes = five_classes(2, 40, anomalous=True)
    u, gamma = (torch.stack([m[of_class == c].mean() for c in range(5)])[classes]
                for m in (normal_maps.mean((1, 2)), normal_maps.amax((1, 2))))
    aligned = cada.normalise(maps, *fitted.predict(features))
    raw, aligned, oracle = (m.amax((1, 2)).numpy() for m in (
        maps, aligned, cada.normalise(maps, u, gamma)))
    assert auroc(aligned, labels) > auroc(oracle, labels) - 0.03
    assert auroc(aligned, labels) > auroc(raw, labels) + 0.15
    assert auroc(aligned, labels, classes) > auroc(raw, labels, classes) - 0.02


def test_gamma_is_above_u_for_any_features(fitted):
    features, *_ = five_classes(3, 4, anomalous=True)
    u, gamma = fitted.predict(torch.cat([features * scale for scale in (1, 1e3, -1e6, 0)]
                                        + [torch.full((1, 64), 1e4), torch.eye(64)[:1] * 1e6]))
    assert u.isfinite().all() and gamma.isfinite().all() and (gamma > u).all()


@pytest.mark.parametrize("features, maps", [
    (torch.randn(1, 64), torch.rand(1, 8, 8)), (torch.randn(3, 64), torch.rand(3, 8, 8)),
    (torch.ones(20, 64), torch.rand(20, 8, 8)),
    (torch.randn(20, 64), torch.full((20, 8, 8), 100.0)), (torch.randn(9, 64), torch.zeros(9, 8, 8))
], ids=["one image", "three images", "equal images", "maps without contrast", "maps of zeros"])
def test_gamma_is_above_u_for_any_training_set(features, maps):
    u, gamma = cada.CADA.fit(features, maps).predict(torch.cat([features, torch.randn(9, 64)]))
    assert u.isfinite().all() and gamma.isfinite().all() and (gamma > u).all()


def test_an_image_is_aligned_by_itself_and_a_fit_by_its_seed(fitted):
    """Neither the neighbours in a batch nor PyTorch's random state change u and gamma."""
    features, maps, *_ = five_classes(1, 40, anomalous=False)
    u, gamma = fitted.predict(features)
    torch.testing.assert_close(fitted.predict(features[3:4]), (u[3:4], gamma[3:4]))
    torch.manual_seed(99)
    again = cada.CADA.fit(features, maps, seed=0).predict(features)
    assert torch.equal(again[0], u) and torch.equal(again[1], gamma)


def test_neither_method_is_told_the_class():
    def parameters(function) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(cada.CADA.fit) == ["features", "maps", "seed"]
    assert parameters(cada.CADA.predict) == ["self", "features"]
    assert parameters(cada.RevDist.forward) == ["self", "features"]
    assert parameters(cnc.CNC.forward) == ["self", "features", "warm_up"]
    assert parameters(cnc.PromptLearner.forward) == ["self"]


@pytest.mark.parametrize("patch", ["one colour", "another image"])
def test_a_ruined_patch_hardly_moves_u_and_gamma(patch):
    """Nor does the patch's 3.5 % of a demo image make it another class."""
    train, test = cada.read_mvtec(DEMO)
    train, test = train[::4], [s for s in test if s.label == 0][::4]
    rng, images = np.random.default_rng(0), [cada.load_image(s.path) for s in test]
    detector = cada.RevDist(cada.Config(**TINY[cada] | {"image_size": 128})).eval()
    batch = cada.load_batch(detector.preprocess, train)
    detector.teacher.estimate_statistics(batch.split(16))

    @torch.no_grad()
    def pool(x):
        return detector.describe(detector.teacher(x))[0]

    classes = [s.cls for s in train]
    scale = {c: 0.1 * 1.4 ** i for i, c in enumerate(sorted(set(classes)))}
    noise = torch.rand(len(train), 32, 32, generator=torch.Generator().manual_seed(0))
    maps = torch.tensor([scale[c] for c in classes])[:, None, None] * (1 + noise)
    head = cada.CADA.fit(pool(batch), maps)
    before = head.predict(pool(torch.stack([*map(detector.preprocess, images)])))
    truth = torch.tensor([1.5 * scale[s.cls] for s in test])
    assert (before[0] / truth - 1).abs().median() < 0.15  # it tells the classes
    for image in images:
        spoilt = (Image.new("RGB", (24, 24), tuple(rng.integers(0, 256, 3).tolist()))
                  if patch == "one colour" else images[rng.integers(9)].crop((50, 50, 74, 74)))
        image.paste(spoilt, tuple(rng.integers(0, 104, 2).tolist()))
    after = head.predict(pool(torch.stack([*map(detector.preprocess, images)])))
    for b, a in zip(before, after):
        assert ((a / b - 1).abs() < 0.05).float().mean() >= 0.9  # of the images


def test_a_detector_of_ones_own_is_aligned_as_the_readme_shows(monkeypatch):
    """Its block of Python, word for word."""
    monkeypatch.chdir(HERE)
    names = {}
    exec((HERE / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    labels, classes = (np.array([getattr(s, what) for s in names["test"]])
                       for what in ("label", "cls"))
    raw, aligned = (cada.image_score(cada.smooth(names[m])).numpy() for m in ("maps", "aligned"))
    assert auroc(aligned, labels) > auroc(raw, labels) + 0.08
    assert auroc(aligned, labels, classes) > auroc(raw, labels, classes) - 0.01


# ==== 1. the papers: CNC, teacher and prompts =====================================================
def cnc_detector(**flags) -> cnc.CNC:
    """In eval mode: dropout would blur every comparison."""
    torch.manual_seed(0)
    return cnc.CNC(cnc.Config(**TINY[cnc] | flags)).eval()


@pytest.fixture(scope="module")
def tiny_clip() -> cnc.Teacher:
    """To look at, not to change. As if it were trained: its tokens are CLIP's own."""
    teacher = cnc.Teacher(cnc.Config(**TINY[cnc]))
    teacher.random = False
    return teacher


@pytest.fixture(scope="module")
def tokens() -> list[torch.Tensor]:
    """What the teacher says of three images: a float16 tensor (3, 1 + N, C) for each tap."""
    return cnc_detector().teacher(random_images(3))


@pytest.fixture
def on_meta(monkeypatch):
    """open_clip's models without memory or numbers, of any size in no time."""
    create = open_clip.create_model

    def create_on_meta(*args, **more):
        with torch.device("meta"):
            return create(*args, device="meta", **more)

    monkeypatch.setattr(open_clip, "create_model", create_on_meta)


@pytest.mark.parametrize("name, size, patch, taps, width, joint, quick", [
    ("ViT-B-32", 224, 32, [4, 8, 12], 768, 512, False),
    ("ViT-L-14-336", 336, 14, [8, 16, 24], 1024, 768, True)])
def test_shapes_of_cnc(name, size, patch, taps, width, joint, quick, on_meta):
    """Without the mixture, whose routing needs numbers; that it keeps shapes is tested below. Also:
    both towers have the activation that the published weights were trained with."""
    with torch.device("meta"):
        detector = cnc.CNC(cnc.Config(teacher=name, weights="none", no_moe=True))
        features = detector.teacher(torch.empty(2, 3, size, size))
        encoded, decoded, _ = detector.decode(features)
        text = detector.prompts()
    assert detector.teacher.taps == taps and detector.teacher.size == size
    shape = (2, 1 + (size // patch) ** 2, width)
    assert [(f.shape, f.dtype) for f in features] == [(shape, torch.float16)] * 3
    assert [f.shape for f in encoded] == [d.shape for d in decoded] == [shape] * 3
    assert detector.teacher.joint(encoded[0]).shape == (*shape[:2], joint)
    assert text.shape == (3, 2, joint)
    for tower in (detector.teacher.clip.visual.transformer, detector.teacher.clip.transformer):
        kinds = {type(block.mlp.gelu).__name__ for block in tower.resblocks}
        assert kinds == {"QuickGELU" if quick else "GELU"}


@pytest.mark.parametrize("name, weights, quick", [
    ("ViT-L-14-336", "openai", True), ("ViT-B-32", "openai", True),
    ("ViT-B-32", "laion2b_s34b_b79k", False), ("ViT-B-32-quickgelu", "laion400m_e32", True),
    ("ViT-L-14-336", "file.pt", True), ("ViT-B-32", "file.pt", False), ("tiny", "file.pt", False)])
def test_quick_gelu_is_known_of_the_weights(name, weights, quick):
    assert cnc.quick_gelu(name, weights) == quick


def test_taps_are_the_outputs_of_the_blocks_named():
    teacher, seen = cnc.Teacher(cnc.Config(**TINY[cnc] | {"taps": "1,4,5"})), []
    teacher.random = False
    for block in teacher.clip.visual.transformer.resblocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    tapped = teacher(random_images(2))
    assert len(seen) == 5 and len(tapped) == 3  # block 6 was not run
    for number, found in zip((1, 4, 5), tapped):
        assert torch.equal(found, seen[number - 1].half())


def test_joint_space_and_preprocessing_are_clips(tiny_clip):
    """The last tap's CLS token, projected, is what CLIP itself says of the image."""
    images = random_images(2)
    expected = F.normalize(tiny_clip.clip.encode_image(images), dim=-1)
    found = tiny_clip.joint(tiny_clip(images)[-1].float())[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # tokens are float16
    image = draw(np.random.default_rng(0), "a", (80, 80), True)[0]
    theirs = open_clip.image_transform(64, is_train=False)(image)
    torch.testing.assert_close(cnc_detector().preprocess(image), theirs, rtol=0, atol=1e-5)


def test_random_clip_is_whitened_by_the_training_images():
    teacher, images = cnc.Teacher(cnc.Config(**TINY[cnc])), random_images(24).cumsum(2)

    def statistics():
        """Of all tokens, tap by tap: length of the mean, share of the largest direction."""
        tokens = torch.stack(teacher(images)).flatten(1, 2).double()
        spread = torch.linalg.svdvals(tokens - tokens.mean(1, keepdim=True)).square()
        return tokens.mean(1).norm(dim=1), spread[:, 0] / spread.sum(1)

    _, share = statistics()
    teacher.estimate_statistics(images.split(5))
    before, (mean, share_after) = weights_of(teacher), statistics()
    assert mean.max() < 0.05 and (share_after < share / 2).all()
    assert same(before, teacher.state_dict())  # frozen again


@BOTH
def test_a_teacher_depends_on_its_seed_alone(script):
    def teacher(seed: int) -> dict:
        return weights_of(DETECTORS[script](script.Config(**TINY[script], seed=seed)).teacher)

    first = teacher(0)
    torch.rand(5)
    assert same(teacher(0), first) and not same(teacher(1), first)


@pytest.mark.parametrize("warm_up", [True, False])
def test_clip_never_changes(warm_up, tokens):
    detector = cnc_detector(tau=1.0).train()
    before = weights_of(detector.teacher)
    assert any("visual" in key for key in before) and any("token_emb" in key for key in before)
    optimizer = torch.optim.Adam((p for p in detector.parameters() if p.requires_grad), 0.1)
    for _ in range(3):
        detector(tokens, warm_up).backward()
        optimizer.step()
    assert same(before, detector.teacher.state_dict())
    assert not any(m.training for m in detector.teacher.modules()) and detector.student.training
    assert not any(p.requires_grad or p.grad is not None for p in detector.teacher.parameters())


# ==== 1. the papers: CNC, mixture of experts ======================================================
@pytest.mark.parametrize("experts, top_k", [(5, 2), (5, 1), (5, 5), (3, 2), (1, 1)])
def test_the_mixture_equals_the_dense_sum_over_all_experts(experts, top_k):
    """And computes only those that were chosen."""
    torch.manual_seed(0)
    moe, x, rows = cnc.GatedMoE(8, experts, top_k), torch.randn(2, 30, 8), []
    logits = moe.gate(x)
    unchosen = logits < logits.topk(top_k).values[..., -1:]
    weights = logits.masked_fill(unchosen, -math.inf).softmax(-1)
    dense = sum(weights[..., k, None] * moe.experts[k](x) for k in range(experts))
    for one in moe.experts:
        one.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    torch.testing.assert_close(moe(x)[0], dense, rtol=0, atol=1e-6)
    assert sum(rows) == top_k * 60


def routed_to(*logits: float) -> cnc.GatedMoE:
    """A mixture of as many experts that sends every token the same way; top_k = 2."""
    torch.manual_seed(0)
    moe = cnc.GatedMoE(8, len(logits), 2)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.bias.copy_(torch.tensor(logits))
    return moe


def test_gradients_reach_the_gate_and_the_chosen_experts_only():
    moe = routed_to(0, 3, 0, 4, 0)
    y, _ = moe(torch.randn(2, 30, 8))
    y.square().sum().backward()
    reached = [any(p.grad is not None and p.grad.any() for p in e.parameters())
               for e in moe.experts]
    assert reached == [False, True, False, True, False]
    assert moe.gate.weight.grad.any(1).tolist() == reached


def test_balance_loss_is_zero_when_all_experts_are_used_alike_and_evens_the_gate():
    x = torch.randn(2, 30, 8)
    losses = [routed_to(favour, 0, 0, 0, 0)(x)[1].item() for favour in (0, 1, 3, 30)]
    assert losses[0] == pytest.approx(0, abs=1e-6) and losses == sorted(losses)
    assert losses[-1] == pytest.approx(4, abs=1e-3)  # (std / mean)^2 of one in five
    moe = routed_to(3, 1, 0, 0, 0)
    moe(x)[1].backward()
    assert moe.gate.bias.grad[0] > 0 > moe.gate.bias.grad[2]  # descent lowers the favourite


# ==== 1. the papers: CNC, text ====================================================================
def touched(module) -> bool:
    return any(p.grad is not None and p.grad.any().item() for p in module.parameters())


def test_no_moe_puts_one_expert_in_place_of_the_mixture():
    full, one = cnc_detector().student, cnc_detector(no_moe=True).student
    shapes, kept = ({k: v.shape for k, v in s.state_dict().items() if not k.startswith("moe.")}
                    for s in (full, one))
    assert shapes == kept
    assert ([p.shape for p in one.moe.parameters()]
            == [p.shape for p in full.moe.experts[0].parameters()])


def test_decoder_runs_from_deep_to_shallow(tokens):
    detector, seen = cnc_detector(), []
    for block in detector.student.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    decoded = detector.decode(tokens)[1]
    assert len(seen) == 3 and all(map(torch.equal, decoded, reversed(seen)))


def test_map_of_cnc_is_in_range_and_of_its_image_alone(tokens):
    detector = cnc_detector()
    with torch.no_grad():
        pooled, maps = detector.describe(tokens)
        single = [detector.describe([t[i:i + 1] for t in tokens]) for i in range(3)]
    assert pooled.ndim == 2 and len(pooled) == 3 and maps.shape == (3, 64, 64)
    assert maps.min() >= 0 and maps.max() <= 2 and maps.std() > 0
    torch.testing.assert_close(torch.cat([p for p, _ in single]), pooled, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([m for _, m in single]), maps, rtol=0, atol=1e-5)


def test_map_of_cnc_shows_where_the_decoder_fails(tokens):
    """All patches reproduced but one, the second of its row."""
    detector = cnc_detector(no_fnp=True)
    grid, patch = detector.teacher.grid, 64 // detector.teacher.grid
    row, column = grid // 2, 1

    def fail_at_one_patch(encoded):
        decoded = [e.clone() for e in encoded]
        for d in decoded:
            d[:, 1 + grid * row + column] *= -1
        return decoded, torch.zeros(())

    detector.student.forward = fail_at_one_patch
    maps = detector.describe(tokens)[1]
    y, x = (patch * k + patch // 2 for k in (row, column))  # four pixels share the centre
    torch.testing.assert_close(maps[:, y - 1:y + 1, x - 1:x + 1],
                               maps.amax((1, 2))[:, None, None].expand(3, 2, 2))
    assert maps.amax((1, 2)).min() > 0.3 and maps[:, :y - patch].abs().max() < 1e-4


# ==== 1. the papers: both =========================================================================
DETECTORS = {cada: cada.RevDist, cnc: cnc.CNC}


@BOTH
def test_a_student_in_bfloat16_is_close_to_one_in_float32(script, monkeypatch):
    """What a GPU runs, as far as a CPU can run it."""
    torch.manual_seed(0)
    detector = DETECTORS[script](script.Config(**TINY[script])).eval()
    features = detector.teacher(random_images(3))
    with torch.no_grad():
        exact, exact_loss = detector.describe(features)[1], detector(features)
        monkeypatch.setattr(script, "autocast", lambda *_: torch.autocast("cpu", torch.bfloat16))
        maps, loss = detector.describe(features)[1], detector(features)
    assert maps.dtype == loss.dtype == torch.float32
    assert not torch.equal(maps, exact)  # else nothing ran in bfloat16
    torch.testing.assert_close(maps, exact, rtol=0, atol=0.04)
    torch.testing.assert_close(loss, exact_loss, rtol=0.02, atol=0.02)


def sgd(parameters, lr, **more) -> torch.optim.SGD:
    """In place of Adam, whose steps do not tell the size of a gradient."""
    return torch.optim.SGD(parameters, 0.01)


def train_a_part(name: str, data: str, out: str, rank: int, count: int, port: int) -> None:
    """What one process of torchrun does: train on its share; the first leaves its weights."""
    script = sys.modules[name]
    script.RANK, script.COUNT = rank, count
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.optim.Adam = torch.optim.AdamW = sgd
    torch.nn.Dropout.forward = lambda self, x: x  # each process draws its own
    cfg = script.Config(**TINY[script] | {"out": out, "batch_size": 4, "data": data})
    cfg.iters, cfg.epochs, cfg.lr, cfg.clip = 2, 2, 0.01, 0
    normal, _ = script.read_dataset(Path(data))
    torch.manual_seed(0)
    detector = DETECTORS[script](cfg)
    script.train_detector(detector, normal[:12], {})


@BOTH
def test_two_processes_follow_the_mean_of_their_gradients(script, data, start, tmp_path):
    """As one process that sees both shares' batches, half by half; the balance loss is of a share,
    and BatchNorm on CPUs too."""
    port = 29500 + os.getpid() % 1000 + (script is cnc)
    jobs = [start(train_a_part, script.__name__, str(data), str(tmp_path), rank, 2, port)
            for rank in (0, 1)]
    assert [ended(job) for job in jobs] == [0, 0]
    found = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["weights"]
    normal = script.read_dataset(data)[0][:12]
    torch.manual_seed(0)
    detector = DETECTORS[script](script.Config(**TINY[script])).train()
    for m in detector.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0
    images = script.load_batch(detector.preprocess, normal)
    detector.teacher.estimate_statistics(images.split(4))
    learners = [p for name, p in detector.named_parameters() if not name.startswith("teacher.")]
    shares, steps = [images[rank::2] for rank in (0, 1)], 2 if script is cada else 6
    batches = []
    for rank in (0, 1):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(script, "RANK", rank)
            batches.append(script.shuffled(6, 2, steps, 0))
    optimizer = sgd(learners, 0)
    for step, rows in enumerate(zip(*batches)):
        if script is cada and step == 1:  # past 80 %
            optimizer.param_groups[0]["lr"] *= 0.2
        optimizer.zero_grad()
        more = {"warm_up": True} if script is cnc else {}
        for share, r in zip(shares, rows):
            (detector(detector.teacher(share[r]), **more) / 2).backward()
        optimizer.step()
    assert len(learners) > 10
    for name, p in detector.named_parameters():
        if not name.startswith("teacher."):
            torch.testing.assert_close(found[name], p.detach(), rtol=1e-3, atol=1e-5, msg=name)


# ==== 2. metrics ==================================================================================
def f1_max(labels, scores) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    return (2 * precision * recall / (precision + recall).clip(1e-12)).max()


def brute_aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """The definition word for word: every distinct threshold, every region."""
    regions = []  # (image, (H, W) bool)
    for i, mask in enumerate(masks):
        labelled, n = ndimage.label(mask, np.ones((3, 3)))
        regions += [(i, labelled == k) for k in range(1, n + 1)]
    fpr, pro = [0.0], [0.0]
    for threshold in sorted(set(maps.ravel()), reverse=True):
        flagged = maps >= threshold
        fpr.append(flagged[~masks].mean())
        pro.append(np.mean([flagged[i][region].mean() for i, region in regions]))
    inside = [(x, y) for x, y in zip(fpr, pro) if x <= 0.3] + [(0.3, np.interp(0.3, fpr, pro))]
    return np.trapezoid([y for _, y in inside], [x for x, _ in inside]) / 0.3


def pixel_case(name: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(name))
    maps, masks = rng.normal(size=(5, 12, 12)), np.zeros((5, 12, 12), bool)
    masks[0, 2:6, 3:9] = True
    if name != "one region":  # regions of different areas, some diagonal; image 4 stays good
        masks[1, [0, 1, 2], [0, 1, 2]] = True
        masks[1, 8:, 9:] = True
        masks[2:4] = rng.random((2, 12, 12)) < 0.1
    maps += 1.5 * masks
    return (maps.round(0) if name == "ties" else masks if name == "perfect" else maps), masks


@pytest.mark.parametrize("name", ["one region", "many regions", "ties", "perfect"])
def test_pixel_metrics_equal_scikit_learn_and_the_definition_of_aupro(name):
    maps, masks = pixel_case(name)
    found = cada.ranking_metrics("P", torch.tensor(maps).float(), torch.tensor(masks))
    flat = masks.ravel(), maps.astype(np.float32).ravel()
    expected = {"P-AUROC": roc_auc_score(*flat), "P-AP": average_precision_score(*flat),
                "P-F1max": f1_max(*flat), "AUPRO": brute_aupro(maps.astype(np.float32), masks)}
    assert found == pytest.approx(expected, abs=1e-6)
    assert name != "perfect" or found == pytest.approx(dict.fromkeys(expected, 1))


def test_regions_are_joined_by_a_corner():
    """Half of a diagonal pair found, a lone pixel not: overlap 1/4, then on a line to (1, 1)."""
    masks, maps = torch.zeros(1, 20, 20, dtype=torch.bool), torch.zeros(1, 20, 20)
    masks[0, [3, 4, 10], [3, 4, 10]] = True
    maps[0, 3, 3] = 1
    at_03 = 0.25 + 0.3 * 0.75
    assert cada.ranking_metrics("P", maps, masks)["AUPRO"] == pytest.approx((0.25 + at_03) / 2)


@pytest.mark.parametrize("digits", [1, 12])  # 1: many ties
def test_image_metrics_equal_scikit_learn(digits):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    scores = (rng.random(60) + 0.3 * labels).round(digits)
    found = cada.ranking_metrics("I", torch.tensor(scores), torch.tensor(labels) == 1)
    assert found == pytest.approx({
        "I-AUROC": roc_auc_score(labels, scores), "I-AP": average_precision_score(labels, scores),
        "I-F1max": f1_max(labels, scores)}, abs=1e-9)


def test_a_class_of_good_images_has_no_metrics_and_does_not_count():
    maps, masks = (torch.tensor(x) for x in pixel_case("many regions"))
    maps, masks = maps.repeat(2, 1, 1), torch.cat([masks, torch.zeros_like(masks)])
    labels, classes = np.array([1, 1, 1, 1, 0] + [0] * 5), np.array(["a"] * 5 + ["b"] * 5)
    found = cada.summarise(maps.amax((1, 2)), labels, classes, maps, masks)
    assert list(found) == ["a", "b", "class mean", "pooled"] and found["b"] == {}
    assert found["class mean"] == found["a"] and found["pooled"].keys() == found["a"].keys()


PEAK = """
import cada, numpy as np, sys, torch
def of_process(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024
masks = torch.zeros(int(sys.argv[1]), 256, 256, dtype=torch.bool)
masks[::2, 100:140, 90:150] = True
maps = torch.rand(masks.shape)
before = of_process("VmRSS")
cada.ranking_metrics("P", maps, masks)
print((of_process("VmHWM") - before) / maps.numel())
"""


def bytes_a_pixel(images: int) -> float:
    """Peak memory of the pixel metrics over that of their arguments, images of 256 x 256."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(images)], cwd=HERE, capture_output=True)
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_13_million_pixels_take_13_bytes_each():
    assert bytes_a_pixel(200) < 13


# ==== 3. the scripts: data ========================================================================
GRADIENT = np.add.outer(np.arange(0, 120, 3), np.arange(0, 100, 2)).astype(np.uint8)  # (40, 50)
COLOURS = np.stack([GRADIENT, 255 - GRADIENT, GRADIENT // 2], axis=-1)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def image_modes() -> dict[str, tuple[Image.Image, str, np.ndarray]]:
    """{what: (image, suffix, the RGB pixels it must be read as)}."""
    palette = np.array([(250, 0, 0), (0, 240, 10), (5, 5, 200), (90, 90, 90)], np.uint8)
    indexed = Image.fromarray(GRADIENT % 4).convert("P")
    indexed.putpalette(palette.ravel().tolist())
    cyan, upright = Image.new("CMYK", (50, 40), (255, 0, 0, 0)), Image.Exif()
    upright[0x0112] = 6  # the camera was turned
    turned = Image.fromarray(np.rot90(COLOURS).copy())
    turned.getexif().update(upright)
    sixteen = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    return {"rgb": (Image.fromarray(COLOURS), ".png", COLOURS),
            "grey": (Image.fromarray(GRADIENT), ".bmp", grey(GRADIENT)),
            "grey 16 bit png": (sixteen, ".png", grey(GRADIENT)),
            "grey 16 bit tiff": (sixteen, ".TIFF", grey(GRADIENT)),
            "palette": (indexed, ".png", palette[GRADIENT % 4]),
            "rgba": (Image.fromarray(np.dstack([COLOURS, GRADIENT])), ".png", COLOURS),
            "turned": (turned, ".png", COLOURS),
            "cmyk jpeg": (cyan, ".JPG", np.full((40, 50, 3), (0, 255, 255)))}


@pytest.mark.parametrize("what", image_modes())
def test_every_kind_of_image_is_read_as_8_bit_rgb(what, tmp_path):
    image, suffix, expected = image_modes()[what]
    exif = {"exif": image.getexif()} if what == "turned" else {}
    read = cada.load_image(save(image, tmp_path / ("image" + suffix), **exif))
    assert read.mode == "RGB"
    tolerance = 2 if "jpeg" in what else 0
    np.testing.assert_allclose(np.asarray(read).astype(int), expected, atol=tolerance)


def test_reads_an_mvtec_tree(tree):
    """Masks are paired by stem: `000` and `000_mask` both fit, and one that sorts first does not
    shift the others. Suffixes may be upper case, hidden files are none, one class is a set too."""
    masks, images = tree / "a/ground_truth/hole", tree / "a/test/hole"
    (masks / "000_mask.png").rename(masks / "000.png")
    (masks / "002_mask.png").rename(masks / "0_mask.png")
    (images / "002.png").rename(images / "0.PNG")
    for folder in (masks, images, tree / "a/train/good"):
        for name in ("._001.png", "Thumbs.db"):
            (folder / name).write_bytes(b"no image")
    train, test = cada.read_dataset(tree)
    assert [(s.cls, s.label, s.mask) for s in train] == [("a", 0, None)] * 7 + [("b", 0, None)] * 7
    assert [s.label for s in test] == [0, 0, 0, 1, 1, 1] * 2
    assert not any(s.mask for s in test if not s.label)
    pairs = {s.path.name: s.mask.name for s in test if s.cls == "a" and s.mask}
    assert pairs == {"000.png": "000.png", "001.png": "001_mask.png", "0.PNG": "0_mask.png"}
    assert {s.cls for part in cada.read_dataset(tree / "b") for s in part} == {"b"}


@pytest.fixture
def visa(tmp_path) -> Path:
    """A raw VisA tree: JPEGs of 80 x 48, mask values 1-9, one defect of a single pixel."""
    rng, root = np.random.default_rng(1), tmp_path / "visa"
    lines = ["object,split,label,image,mask"]
    for cls in ("candle", "pcb1"):
        for i in range(5):
            path = f"{cls}/Data/Images/Normal/{i:04}.JPG"
            save(draw(rng, "a", (80, 48), False)[0], root / path)
            lines.append(f"{cls},{'train' if i < 3 else 'test'},normal,{path},")
        for i in range(3):
            path = f"{cls}/Data/Images/Anomaly/{i:03}.JPG"
            mask = f"{cls}/Data/Masks/Anomaly/{i:03}.png"
            save(draw(rng, "a", (80, 48), True)[0], root / path)
            values = np.zeros((48, 80), np.uint8)
            if i == 0:
                values[1, 2] = 1  # falls between the pixels of a 32 x 32 mask
            else:
                values[10:30, 20:60] = rng.integers(1, 10, (20, 40))
            save(Image.fromarray(values), root / mask)
            lines.append(f"{cls},test,anomaly,{path},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return root


def test_reads_a_raw_visa_tree(visa):
    """Masks are binarised, then resized as the image is; a tiny defect keeps its label."""
    train, test = cada.read_dataset(visa)
    assert [(s.cls, s.label) for s in train] == [("candle", 0)] * 3 + [("pcb1", 0)] * 3
    assert [s.label for s in test] == [0, 0, 1, 1, 1] * 2
    assert test[3].mask == visa / "candle/Data/Masks/Anomaly/001.png"
    masks, expected = cada.load_masks(test, 40), torch.zeros(40, 40, dtype=torch.bool)
    assert masks.dtype == torch.bool and masks.shape == (10, 40, 40)
    expected[8:25, 10:30] = True  # rows 10-29 of 48 and columns 20-59 of 80, whatever their value
    assert (masks[3] == expected).all() and not masks[0].any()
    assert not cada.load_masks(test, 32)[2].any()


def test_masks_may_be_coloured(tmp_path):
    """With an alpha channel that says nothing; a dark colour is a defect too."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 3], pixels[2, 3] = 255, (9, 0, 0, 255)
    path = save(Image.fromarray(pixels), tmp_path / "mask.png")
    found = cada.load_masks([cada.Sample(path, mask=path)], 8)[0]
    assert found.nonzero().tolist() == [[2, 3]]


def settings(script, *words) -> tuple:
    return script.read_command_line([str(w) for w in words], script.Config, "")[2]


def test_data_is_found_in_the_documented_order(tmp_path, monkeypatch):
    monkeypatch.setattr(cada, "HERE", tmp_path)
    for name in ("demo", "visa", "mvtec"):
        (tmp_path / "data" / name).mkdir(parents=True)
        assert settings(cada).data == str(tmp_path / "data" / name)
    assert settings(cada, "--data", tmp_path).data == str(tmp_path)


def test_defaults_are_the_published_ones_but_small_on_the_demo_set(data, visa):
    real = settings(cada, "--data", data)
    assert (real.teacher, real.weights) == ("wide_resnet50_2", "IMAGENET1K_V1")
    assert (real.image_size, real.batch_size, real.iters, real.lr) == (256, 16, 5000, 2e-3)
    demo = settings(cada, "--data", DEMO, "--batch-size", 7)
    assert (demo.teacher, demo.weights, demo.image_size) == ("resnet18", "none", 128)
    assert demo.batch_size == 7  # a flag goes before both
    real = settings(cnc, "--data", data)
    assert (real.teacher, real.weights, real.batch_size) == ("ViT-L-14-336", "openai", 8)
    assert (real.epochs, real.lr, real.tau) == (250, 1e-3, 0.001)
    assert (real.experts, real.top_k, real.theta) == (5, 2, 5)
    assert settings(cnc, "--data", visa).epochs == 200
    assert settings(cnc, "--data", DEMO).teacher == "tiny"


def test_demo_set_is_what_it_claims_and_is_made_again_from_its_seed(tmp_path):
    train, test = cada.read_mvtec(DEMO)
    for cls in {s.cls for s in train}:
        labels = [s.label for s in test if s.cls == cls]
        assert sum(s.cls == cls for s in train) == 40
        assert labels.count(0) == labels.count(1) == 16
    shares = cada.load_masks(test, 128).float().mean((1, 2))[[s.label == 1 for s in test]]
    assert len(train) == 320 and shares.min() > 0 and shares.max() > 0.2
    spec = importlib.util.spec_from_file_location("prepare", HERE / "data/prepare.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    prepare.write_class(tmp_path, "pill")
    again, kept = ({p.relative_to(root): np.asarray(Image.open(p)).astype(int)
                    for p in root.glob("pill/**/*.*")} for root in (tmp_path, DEMO))
    assert again.keys() == kept.keys()
    # Not byte for byte: JPEG libraries round differently.
    assert max(np.abs(again[p] - kept[p]).mean() for p in kept) < 1


# ==== 3. the scripts: as a user runs them =========================================================
VARIANTS = {cada: ["raw", "oracle", "cada"], cnc: ["text", "cnc"]}


@BOTH
def test_train_writes_and_prints_what_it_says(script, trained):
    done, labels = trained[script], numbers(trained[script].out, "label")[:, 0]
    assert done.files == {"checkpoint.pt", "metrics.json", "scores.csv", "heatmaps.png",
                          *["distributions.png"] * (script is cada)}
    for name in done.files:
        if name.endswith(".png"):
            assert np.asarray(Image.open(done.out / name).convert("L")).std() > 5
    classes = np.array([row["class"] for row in rows_of(done.out)])
    assert list(results(done.out)) == VARIANTS[script]
    for variant, found in results(done.out).items():
        scores = numbers(done.out, variant)[:, 0]
        assert set(found) == {"a", "b", "class mean", "pooled"}
        assert list(found["pooled"]) == ["I-AUROC", "I-AP", "I-F1max", "P-AUROC", "P-AP",
                                         "P-F1max", "AUPRO"]
        assert found["pooled"]["I-AUROC"] == pytest.approx(auroc(scores, labels))
        assert found["class mean"]["I-AUROC"] == pytest.approx(auroc(scores, labels, classes))
        for part in found:
            assert re.search(rf"^{part} +{variant} ", done.stdout, re.M)
    assert "threshold" in done.stdout
    assert "RANDOM" in done.stderr and "\r" not in done.stderr  # no progress bar in a pipe


@BOTH
def test_eval_repeats_the_numbers_and_predict_gives_its_scores(script, data, trained, tmp_path,
                                                              monkeypatch, capsys):
    done, out = trained[script], tmp_path / "out"
    words = "--checkpoint", done.checkpoint, "--out", out
    assert run(script, "eval", *words) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:-1] == done.stdout.splitlines()[:-1]
    assert results(out) == results(done.out) and rows_of(out) == rows_of(done.out)
    assert not (out / "checkpoint.pt").exists()
    monkeypatch.setattr(script, "read_dataset", None)  # predict needs none
    paths = data / "b/test", data / "a/test/hole/001.png"
    assert run(script, "predict", *paths, *words) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scored = {row["path"]: row for row in rows_of(done.out)}
    assert len(told) == 7 and len({row["overlay"] for row in told}) == 7
    for row in told:
        expected = scored[row["path"]]
        assert row["score"] == pytest.approx(float(expected[script.__name__]), abs=1e-4)
        assert str(row["anomalous"]) == expected["anomalous"]
        assert Image.open(row["overlay"]).size == Image.open(row["path"]).size
    assert run(script, "predict", paths[1], *words, "--threshold", 1e-9) == 0
    assert json.loads(capsys.readouterr().out)["anomalous"]


def test_predict_takes_any_image_and_has_one_fixed_scale(trained, tmp_path, capsys):
    for i, name in enumerate(("grey 16 bit png", "rgba", "cmyk jpeg")):
        image, suffix, _ = image_modes()[name]
        save(image, tmp_path / "images" / f"deep/{i}{suffix}")
    words = "predict", tmp_path / "images", "--checkpoint", trained[cada].checkpoint
    heat = []
    for threshold in (1e9, 1, 1e-9):  # cold, warm, hot: scaling by image would give three equal ones
        assert run(cada, *words, "--out", tmp_path / "out", "--threshold", threshold) == 0
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [Path(row["path"]).name for row in told] == ["0.png", "1.png", "2.JPG"]
        shown, image = Image.open(told[1]["overlay"]), COLOURS.astype(int)
        assert shown.size == (50, 40)
        heat.append(np.abs(np.asarray(shown.convert("RGB")).astype(int) - image).mean())
    assert heat[0] == 0 < heat[1] < heat[2]


@BOTH
def test_neither_the_cache_nor_the_names_of_classes_change_a_score(script, tree, trained, tmp_path):
    """Also: one seed gives one result, the run compared with being another process."""
    (tree / "a").rename(tree / "screws")
    (tree / "b").rename(tree / "washers")
    words = "--data", tree, "--out", tmp_path / "out", *FLAGS[script], "--cache", "off"
    assert run(script, *words) == 0
    assert {row["class"] for row in rows_of(tmp_path / "out")} == {"screws", "washers"}
    np.testing.assert_array_equal(numbers(tmp_path / "out", *VARIANTS[script]),
                                  numbers(trained[script].out, *VARIANTS[script]))
    assert set(listing(tmp_path / "out")) == trained[script].files


def child(log: str, function, args: tuple) -> None:
    """Call a function in a process of its own."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    sys.exit(function(*args))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start child(): by fork from a process that has imported everything and done nothing."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context, children = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload([__name__])

    def start(function, *args):
        log = str(tmp_path / f"log-{len(children)}")
        children.append(context.Process(target=child, args=(log, function, args)))
        children[-1].start()
        return children[-1]

    yield start
    for process in children:
        process.kill()


def ended(process) -> int:
    process.join(100)
    return process.exitcode


def killed_run(name: str, words: list[str]) -> int:
    """kill -9, right after the second checkpoint was saved."""
    script = sys.modules[name]
    save = script.save_checkpoint

    def save_and_die(detector, content):
        save(detector, content)
        if content["step"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    script.save_checkpoint = save_and_die
    return script.main(words)


@BOTH
def test_a_killed_run_goes_on_as_if_nothing_had_happened(script, data, start, trained, tmp_path,
                                                         fails):
    out = tmp_path / "out"
    words = ["--data", str(data), "--out", str(out), *FLAGS[script]]
    assert ended(start(killed_run, script.__name__, words)) == -signal.SIGKILL
    assert set(listing(out)) == {"checkpoint.pt"}  # and no cache
    fails(script, "eval", says=["--resume"])
    assert run(script, "--resume", "--out", out) == 0
    assert results(out) == results(trained[script].out)
    assert rows_of(out) == rows_of(trained[script].out)


def test_control_c_ends_in_one_line(data, tmp_path, monkeypatch, capsys):
    def press(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cada.RevDist, "forward", press)
    assert run(cada, "--data", data, "--out", tmp_path, *FLAGS[cada]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("cada.py: error: interrupted")


@BOTH
def test_the_threshold_comes_from_images_that_were_kept_back(script, data, trained, monkeypatch):
    """By the seed, whatever the class; none of them is trained on."""
    normal, _ = script.read_dataset(data)
    cfg = script.Config(**TINY[script], holdout=0.3)
    kept, held = script.hold_out(cfg, normal)
    assert len(held) == 4 and sorted(map(str, kept + held)) == sorted(map(str, normal))
    assert script.hold_out(cfg, normal) == (kept, held)
    cfg.seed = 1
    assert script.hold_out(cfg, normal) != (kept, held)
    cfg.holdout = 0
    assert script.hold_out(cfg, normal) == (normal, normal)
    content = torch.load(trained[script].checkpoint, weights_only=True)
    held = script.hold_out(script.Config(**content["config"]), normal)[1]
    detector = script.build(script.Config(**content["config"]), content)
    maps = (cada.score(detector, content, held) if script is cada
            else cnc.score(detector, held)[0])[script.__name__]
    assert content["thresholds"][script.__name__] == pytest.approx(
        script.image_score(maps).max().item(), rel=1e-4)  # of one image, the largest


def test_the_conformal_threshold_lets_the_promised_share_pass():
    """The ceil((n + 1) q)-th smallest of n normal scores: over many draws, a new normal score lies
    above it with a probability of at most 1 - q."""
    generator, above = torch.Generator().manual_seed(0), []
    for n, q in ((30, 0.9), (7, 0.75)):
        cfg = cada.Config(**TINY[cada], quantile=q)
        for _ in range(2000):
            x = torch.rand(n + 1, 2, 2, generator=generator)
            above.append(cada.image_score(x[-1:]).item() > cada.threshold(cfg, x[:-1]))
        assert 0.8 * (1 - q) < np.mean(above[-2000:]) < 1.1 * (1 - q)


def test_good_images_alone_are_enough_to_train_and_predict(tree, tmp_path, capsys):
    for cls in "ab":
        shutil.rmtree(tree / cls / "test")
        shutil.rmtree(tree / cls / "ground_truth")
    out = tmp_path / "out"
    for script in (cada, cnc):
        assert run(script, "--data", tree, "--out", out, *FLAGS[script]) == 0
        assert "nothing to evaluate" in capsys.readouterr().out
        assert set(listing(out)) == {"checkpoint.pt"}
        assert run(script, "predict", tree / "a/train/good/000.png", "--out", out) == 0
        assert json.loads(capsys.readouterr().out)["threshold"] > 0
        shutil.rmtree(out)


def test_without_masks_there_are_image_metrics_only(tree, trained, tmp_path):
    """And a class may lack good or defective test images."""
    for cls in "ab":
        shutil.rmtree(tree / cls / "ground_truth")
    words = "eval", "--data", tree, "--out", tmp_path / "out", "--checkpoint"
    assert run(cada, *words, trained[cada].checkpoint) == 0
    found, expected = (results(out)["cada"]["pooled"] for out in (tmp_path / "out",
                                                                  trained[cada].out))
    assert found == {k: v for k, v in expected.items() if k.startswith("I-")}
    shutil.rmtree(tree / "a/test/good")
    shutil.rmtree(tree / "b/test/hole")
    assert run(cnc, *words, trained[cnc].checkpoint) == 0
    assert results(tmp_path / "out")["cnc"]["a"] == {}


def test_classes_that_were_not_trained_on_have_no_oracle(visa, trained, tmp_path):
    words = "--checkpoint", trained[cada].checkpoint, "--out", tmp_path / "out"
    assert run(cada, "eval", *words, "--data", visa, "--batch-size", 3) == 0
    assert list(results(tmp_path / "out")) == ["raw", "cada"]


def test_a_checkpoint_is_plain_and_complete(trained):
    """Of a random teacher it holds the weights."""
    for script in (cada, cnc):
        content = torch.load(trained[script].checkpoint, weights_only=True)
        cfg = script.Config(**content["config"])
        assert cfg.image_size == 64 and content["optimizer"]["state"] and content["thresholds"]
        cfg.seed = 1
        teacher = weights_of(script.build(cfg, content).teacher)
        assert teacher and all(torch.equal(v, content["weights"][f"teacher.{k}"])
                               for k, v in teacher.items())


@BOTH
def test_a_teacher_from_a_file_is_used_and_not_copied(script, data, tmp_path):
    torch.manual_seed(5)
    model = torchvision.models.resnet18() if script is cada else cnc_detector(seed=5).teacher.clip
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    flags = [*FLAGS[script], "--weights", tmp_path / "weights.pt", "--out", tmp_path / "out",
             *(["--iters", 1] if script is cada else ["--epochs", 1])]
    assert run(script, "--data", data, *flags) == 0
    content = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)
    assert not any(name.startswith("teacher.") for name in content["weights"])
    teacher, key = script.build(script.Config(**content["config"]), content).teacher, "conv1.weight"
    found = teacher.stem[0].weight if script is cada else teacher.clip.visual.conv1.weight
    assert torch.equal(found, model.state_dict()[key if script is cada else f"visual.{key}"])
    assert run(script, "eval", "--out", tmp_path / "out") == 0


def test_cnc_without_its_parts_and_with_others_from_train_to_eval(data, tmp_path):
    for i, flags in enumerate(("--no-moe --no-fnp --no-constraint",
                               "--taps 1,3 --experts 9 --top-k 3 --theta 0")):
        out = tmp_path / str(i)
        assert run(cnc, "--data", data, "--out", out, *FLAGS[cnc], *flags.split()) == 0
        assert run(cnc, "eval", "--checkpoint", out / "checkpoint.pt", "--out", tmp_path / "e") == 0
        assert rows_of(tmp_path / "e") == rows_of(out)


def test_cada_on_cnc(data, trained, tmp_path, monkeypatch, capsys):
    """It leaves the detector as it is, trains no step of a trained one, writes by default not into
    that one's folder, and eval, predict and --resume work."""
    monkeypatch.chdir(tmp_path)
    on_cnc, out, before = ["--base", "cnc"], Path("runs/cada"), listing(trained[cnc].out)
    with monkeypatch.context() as m:
        m.setattr(cnc.CNC, "forward", lambda *args, **more: pytest.fail("it trained"))
        assert run(cada, *on_cnc, "--checkpoint", trained[cnc].checkpoint) == 0
    assert listing(trained[cnc].out) == before
    np.testing.assert_array_equal(numbers(out, "raw"), numbers(trained[cnc].out, "cnc"))
    assert run(cada, *on_cnc, "--data", data, "--out", "fresh", *FLAGS[cnc]) == 0
    assert rows_of(Path("fresh")) == rows_of(out)
    assert run(cada, "eval", *on_cnc, "--out", out) == 0 and rows_of(out) == rows_of(Path("fresh"))
    assert run(cada, "--resume", *on_cnc, "--out", out) == 0
    assert rows_of(out) == rows_of(Path("fresh"))
    capsys.readouterr()
    assert run(cada, "predict", *on_cnc, "--out", out, data / "a/test/hole/000.png") == 0
    told, row = json.loads(capsys.readouterr().out), rows_of(out)[3]
    assert told["score"] == pytest.approx(float(row["cada"]), abs=1e-3)
    assert run(cnc, "eval", "--checkpoint", out / "checkpoint.pt", "--out", "as-cnc") == 2


@BOTH
def test_help_names_every_flag_with_its_comment(script, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for f in fields(script.Config):
        assert f"--{f.name.replace('_', '-')} " in text
    assert "anew in every step [ours] D2 (default: on)" in text  # a comment of two lines


# ==== 3. the scripts: what the README says ========================================================
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_every_departure_is_in_the_ledger_and_in_the_code():
    code = "".join((HERE / name).read_text(encoding="utf-8") for name in ("cada.py", "cnc.py"))
    tags = re.findall(r"\[ours\](?:\s+(D\d+|Dn))?", code)  # Dn: where docstrings explain the tag
    ledger = re.findall(r"^\| (D\d+) \|", README, re.M)
    assert "" not in tags and ledger == [f"D{i + 1}" for i in range(len(ledger))]
    assert set(tags) - {"Dn"} == set(ledger)


def test_the_readme_is_short_and_links_to_what_is_there():
    assert len(README.split()) <= 1300
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (HERE / link).is_file(), link


def test_the_cache_of_a_real_set_is_as_large_as_stated(on_meta):
    """By the shapes and the type of what the teachers give: MVTec AD / VisA, training images."""
    with torch.device("meta"):
        clip = cnc.Teacher(cnc.Config(weights="none"))
        found = (cada.Teacher("wide_resnet50_2", "none", 0)(torch.empty(1, 3, 256, 256)),
                 clip(torch.empty(1, 3, clip.size, clip.size)))
    sizes = [sum(f.numel() * f.itemsize for f in features) for features in found]
    cells = [f"{3629 * size / 2**30:.1f} / {8659 * size / 2**30:.1f} GiB" for size in sizes]
    assert f"| cached features | {' | '.join(cells)} |" in README


def test_every_command_of_the_readme_runs(tree, tmp_path, monkeypatch, capsys):
    """Word for word and in their order, on a tiny data set with tiny defaults; but those that CI
    runs as they are."""
    for name in ("mvtec", "mine"):
        shutil.copytree(tree, tmp_path / "data" / name)
    (tmp_path / "folder").mkdir()
    for name in ("photo.jpg", "folder/1.png"):
        Image.fromarray(COLOURS).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for script, tiny in ((cada, {"iters": 2, "batch_size": 4}), (cnc, {"epochs": 1})):
        defaults = {f.name: f.default for f in fields(script.Config)} | TINY[script] | tiny
        monkeypatch.setattr(script.Config.__init__, "__defaults__", tuple(defaults.values()))
    blocks = re.findall(r"^ *```\n(.*?)```", README, re.M | re.S)
    commands = [line.strip() for line in "".join(blocks).splitlines()
                if line.strip().startswith(("python ", "pytest ", "pip "))]
    in_ci = [line for line in commands if f'run "{line}"' in (HERE / ".ci/run").read_text()]
    assert len(in_ci) == 3 and len(commands) > 8
    for line in commands:
        if line not in in_ci:
            script, *words = shlex.split(line)[1:]
            assert run({"cada.py": cada, "cnc.py": cnc}[script], *words) == 0, line
    assert capsys.readouterr().out.count('"overlay"') == 2


def shared_sections(script) -> dict[str, str]:
    """{name: text} of what stands between `# ==== shared: NAME` and `# ==== end shared`."""
    source = Path(script.__file__).read_text()
    found = re.findall(r"^# ==== shared: (.+?)$\n(.*?)^# ==== end shared$", source, re.M | re.S)
    assert len(dict(found)) == source.count("==== shared:") == source.count("==== end shared")
    return dict(found)


def test_the_scripts_share_sections_letter_for_letter_and_nothing_else():
    ours, theirs = shared_sections(cada), shared_sections(cnc)
    assert list(ours) == list(theirs) and len(ours) >= 6
    for name in ours:
        assert ours[name] == theirs[name], f"the copies of {name!r} differ"
    assert "cada" not in re.findall(r"^ *(?:import|from) (\w+)", Path(cnc.__file__).read_text(), re.M)
    assert re.findall(r"^( *)import cnc", Path(cada.__file__).read_text(), re.M) == [" " * 12]


# ==== 4. bad input ================================================================================
@pytest.fixture
def fails(tmp_path, capsys):
    """Run the command line and see it end as a user's mistake should: exit code 2, one line that
    says what is wrong, and an output folder (tmp_path/out) without anything new in it."""
    def check(script, *words, says):
        out = tmp_path / "out"
        before = listing(out) if out.is_dir() else {}
        code = run(script, *words, "--out", out)
        lines, name = capsys.readouterr().err.splitlines(), f"{script.__name__}.py: error: "
        assert code == 2
        assert [line for line in lines if line.startswith(name)] == lines[-1:]
        assert not any("Traceback" in line for line in lines)
        for word in says:
            assert word in lines[-1]
        assert (listing(out) if out.is_dir() else {}) == before

    return check


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def without_training_images(tree):
    for path in (tree / "a/train/good").iterdir():
        path.unlink()


MASK, IMAGE = "a/ground_truth/hole/001_mask.png", "a/test/hole/001.png"
BAD_DATA = {  # what is done to a data set; what the one line says
    "no folder": (remove, ["--data", "no such folder"]),
    "an empty folder": (lambda t: (remove(t), t.mkdir()), ["--data", "no training images"]),
    "a class without training images": (without_training_images, ["a/train/good", "no training"]),
    "no image": (lambda t: (t / "a/train/good/003.png").write_text("text"), ["good/003.png"]),
    "half an image": (lambda t: (t / IMAGE).write_bytes((t / IMAGE).read_bytes()[:-900]), [IMAGE]),
    "a mask without image": (lambda t: (t / IMAGE).unlink(), ["ground_truth/hole", "hole/001"]),
    "an image without mask": (lambda t: (t / MASK).unlink(), ["ground_truth/hole", "hole/001"]),
    "a mask of a misspelled kind": (
        lambda t: save(Image.new("L", (64, 64)), t / "a/ground_truth/hoel/000_mask.png"),
        ["ground_truth/hoel", "000"]),
    "a mask of another size": (lambda t: save(Image.new("L", (64, 80)), t / MASK), [MASK, "64 x 64"]),
    "no mask": (lambda t: (t / MASK).write_text("text"), [MASK])}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data(what, tree, fails):
    spoil, says = BAD_DATA[what]
    spoil(tree)
    fails(cada, "--data", tree, *FLAGS[cada], says=says)


BAD_WORDS = {cada: {
    "explain": ["explain", "predict"], "train data/mvtec": ["data/mvtec"], "predict": ["predict"],
    "--frobnicate 3": ["--frobnicate"], "--iters ten": ["--iters", "ten"],
    "--iters 0": ["--iters 0"], "--batch-size -4": ["--batch-size -4"], "--lr nan": ["--lr nan"],
    "--seed -1": ["--seed"], "--quantile 0": ["--quantile"], "--image-size 100": ["--image-size"],
    "--holdout 1": ["--holdout"], "--cache tape": ["--cache tape"], "--loss mse": ["--loss mse"],
    "--device abacus": ["--device abacus"], "--teacher vgg16": ["--teacher vgg16"],
    "--teacher resnet18 --weights IMAGENET1K_V9": ["--weights IMAGENET1K_V9"],
    "--base unet": ["--base", "cnc"], "--base cnc --iters 3": ["--iters"],
    "--checkpoint nowhere.pt": ["nowhere.pt"], "--resume": ["checkpoint.pt"],
    "eval": ["checkpoint.pt"], "predict nowhere.png --checkpoint TRAINED": ["nowhere.png"],
    "predict EMPTY --checkpoint TRAINED": ["no images"],
    "eval --image-size 96 --checkpoint TRAINED": ["--image-size"],
    "eval --batch-size 0 --checkpoint TRAINED": ["--batch-size 0"],
    "predict x.png --data DATA --checkpoint TRAINED": ["--data"],
    "--resume --iters 8 --checkpoint TRAINED": ["--iters"],
    "eval --checkpoint OTHER": ["checkpoint.pt", "--base"],
    "eval --base cnc --checkpoint OTHER": ["CADA", "--base cnc"],
    "predict x.png --checkpoint MALICIOUS": ["malicious.pt"],
    "--data DATA TINY --weights MALICIOUS": ["--weights", "malicious.pt"]}, cnc: {
    "--epochs 0": ["--epochs 0"], "--taps 7 --data DATA TINY": ["--taps 7", "6"],
    "--taps 4,2 --data DATA TINY": ["--taps 4,2", "rising"], "--taps two,4": ["--taps two,4"],
    "--top-k 6": ["--top-k 6"], "--experts 0": ["--top-k"], "--theta -1": ["--theta -1"],
    "--tau 0": ["--tau 0"], "--clip -1": ["--clip"], "--iters 5": ["--iters"],
    "--data DATA TINY --image-size 70": ["--image-size 70", "16"],
    "--teacher vgg16": ["--teacher vgg16", "ViT-B-16"],
    "--data DATA TINY --weights openai": ["--weights openai", "tiny"],
    "--teacher RN50 --weights none --data DATA": ["--teacher RN50", "plain ViT"],
    "--teacher ViT-B-16-SigLIP --weights none --data DATA": ["SigLIP"],
    "--resume": ["checkpoint.pt"], "eval --no-moe --checkpoint TRAINED": ["--no-moe"],
    "eval --checkpoint OTHER": ["checkpoint.pt", "--base"],
    "eval --checkpoint MALICIOUS": ["malicious.pt"],
    "--data DATA TINY --weights MALICIOUS": ["--weights", "malicious.pt"]}}


class Payload:
    """A pickle of it, when loaded, creates a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("script, words", [(s, w) for s in BAD_WORDS for w in BAD_WORDS[s]],
                         ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_bad_command_lines(script, words, data, trained, tmp_path, on_meta, fails):
    """TRAINED: a checkpoint; OTHER: one of the other script; MALICIOUS: one that would run code."""
    ran, malicious, empty = (tmp_path / name for name in ("ran", "malicious.pt", "empty"))
    malicious.write_bytes(pickle.dumps({"detector": "revdist", "config": Payload(ran)}))
    empty.mkdir()
    other = trained[cnc if script is cada else cada].checkpoint
    places = {"TRAINED": [trained[script].checkpoint], "OTHER": [other], "MALICIOUS": [malicious],
              "EMPTY": [empty], "DATA": [data], "TINY": FLAGS[script]}
    fails(script, *sum((places.get(w, [w]) for w in words.split()), []), says=BAD_WORDS[script][words])
    assert not ran.exists()
    with open(malicious, "rb") as file:
        pickle.load(file)
    assert ran.exists()  # so the payload works


def nan_loss(script, monkeypatch, tmp_path):
    loss = DETECTORS[script].forward
    monkeypatch.setattr(DETECTORS[script], "forward", lambda *a, **k: loss(*a, **k) * math.nan)
    return [], ["loss", "nan", "--lr"]


def no_gpu(script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return ["--device", "cuda"], ["--device cuda"]


def full_disk(script, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    return [], ["--cache", "GiB"]


def full_disk_for_the_checkpoint(script, monkeypatch, tmp_path):
    def fill(content, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", fill)
    return [], ["checkpoint.pt", "No space left"]


def out_is_a_file(script, monkeypatch, tmp_path):
    (tmp_path / "out").write_text("not a folder")
    return [], [str(tmp_path / "out")]


def weights_that_do_not_fit(script, monkeypatch, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    return ["--weights", tmp_path / "weights.pt"], [f"--weights {tmp_path / 'weights.pt'}"]


def no_network(script, monkeypatch, tmp_path):
    def download(*args, **more):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # what was downloaded before must not help
    monkeypatch.setattr(torch.hub, "urlopen", download)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    tag = "IMAGENET1K_V1" if script is cada else "openai"
    more = [] if script is cada else ["--teacher", "ViT-B-32", "--image-size", 224]
    return [*more, "--weights", tag], [f"--weights {tag}", "Name or service", "none"]


@BOTH
@pytest.mark.parametrize("spoil", [
    nan_loss, no_gpu, full_disk, full_disk_for_the_checkpoint, out_is_a_file,
    weights_that_do_not_fit, no_network], ids=lambda f: f.__name__)
def test_a_run_that_cannot_go_on(script, spoil, data, tmp_path, monkeypatch, fails):
    words, says = spoil(script, monkeypatch, tmp_path)
    fails(script, "--data", data, *FLAGS[script], *words, says=says)
