"""Make or lay out the data sets that need no manual download, as MVTec-style trees.

    python data/prepare.py demo [--out data/demo] [--seed 0] [--force]
    python data/prepare.py elpv [--out data/elpv] [--seed 0] [--force]

`demo` draws 8 classes (4 textures, 4 objects; 40 train, 16 good and 16 defective test images each)
from a seed. The classes range from a perfectly regular wire grid to granite, in which no two images
look alike, so a detector's scores of *normal* images differ from class to class.
`elpv` copies 2,223 real photographs of solar cells out of the PyPI package `elpv-dataset`
(pip install elpv-dataset).

    render(rng) -> image, object mask -> defect(...) -> image, defect mask -> light, noise -> JPEG

Until they are saved, images are float RGB arrays (128, 128, 3), nominally in [0, 1], and masks are
bool arrays (128, 128). How hard each defect is to see is set in the table CLASSES alone.
"""
import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

SIZE = 128                # pixels; all lengths below are in pixels too
N_TRAIN, N_GOOD, N_DEFECT = 40, 16, 4    # images per class; N_DEFECT is per kind of defect
JPEG_QUALITY = 88
MASK_ALPHA = 0.15         # a pixel counts as changed where the defect is at least this opaque
LARGE, SMALL = 0.33, 0.06     # share of the object that a patch-like defect covers
RUST = np.array((-0.3, -0.6, -1.0))    # relative change of R, G, B under a stain of strength 1
TEST_SHARE = 0.25         # of the normal ELPV images
MARKER = "PREPARED.txt"   # written into every tree we make; --force deletes nothing without it
MARKER_LINE = "Made by data/prepare.py"
Y, X = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2    # pixel centres, origin in the image centre
EVERYWHERE = np.ones((SIZE, SIZE), bool)          # the object mask of a texture


class UserError(Exception):
    """A mistake the user can repair; the message is one line that names the remedy."""


# ==== drawing ==================================================================================

def cover(distance, soft=1.0):
    """Opacity of a shape given its signed distance (negative inside); soft=1 is anti-aliasing."""
    return np.clip(0.5 - distance / soft, 0, 1)


def paint(image, colour, alpha):
    """Blend a colour (3,) or a whole image over `image` with opacity `alpha` (H, W)."""
    return image + alpha[..., None] * (np.asarray(colour) - image)


def noise(rng, sigma):
    """Smooth random field (H, W) with mean 0 and variance 1; sigma may be a pair (y, x)."""
    field = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), sigma, mode="wrap")
    return (field - field.mean()) / field.std()


def plain(*colour):
    """A single-coloured image."""
    return np.ones((SIZE, SIZE, 1)) * colour


def box(x, y, width, height, corner=1.0):
    """Signed distance to a rounded rectangle centred at the origin of (x, y)."""
    dx, dy = np.abs(x) - width / 2 + corner, np.abs(y) - height / 2 + corner
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) - corner


def with_shadow(background, alpha):
    """Darken the background below and to the right of an object."""
    shade = ndimage.shift(ndimage.gaussian_filter(alpha, 4), (4, 3))
    return background * (1 - 0.45 * shade[..., None])


# ==== the eight classes: render(rng) -> (image, object mask) ===================================

def grid(rng):
    """Woven wire: the most regular class, only its phase moves by a fraction of a pixel."""
    period, radius = 16, 4.4
    x, y = X + rng.normal(0, 0.3), Y + rng.normal(0, 0.3)
    column, row = np.round(x / period), np.round(y / period)

    def wire(offset, height):
        lit = np.sqrt(np.clip(1 - (offset / radius) ** 2, 0, 1)) - 0.35 * offset / radius
        tone = (0.22 + 0.5 * lit) * (1 + 0.22 * height)
        return tone[..., None] * (1.0, 0.93, 0.80), cover(np.abs(offset) - radius)

    # At a crossing the two heights have opposite signs: every wire goes over, under, over, ...
    rise = np.cos(np.pi * (y / period + column)), np.cos(np.pi * (x / period + row + 1))
    (upright, a), (level, b) = wire(x - period * column, rise[0]), wire(y - period * row, rise[1])
    image = paint(plain(0.10, 0.11, 0.13), level, b)
    return paint(image, upright, a * np.where(rise[0] > rise[1], 1, 1 - b)), EVERYWHERE


def fabric(rng):
    """Denim twill: regular weave, but every yarn has its own thickness and shade."""
    u = (X + 0.5 * noise(rng, 14)) / 5 + rng.uniform(0, 4)
    v = (Y + 0.5 * noise(rng, 14)) / 5 + rng.uniform(0, 4)
    column, row = np.floor(u).astype(int), np.floor(v).astype(int)
    warp_on_top = (column + row) % 4 < 3     # stepping by one each row draws the diagonal ribs
    round_yarn = np.where(warp_on_top, np.sin(np.pi * (u % 1)), np.sin(np.pi * (v % 1)))
    warp_shade, weft_shade = rng.normal(0, 0.06, (2, 64))
    yarn_shade = np.where(warp_on_top, warp_shade[column], weft_shade[row])
    dye = np.array((0.24, 0.34, 0.55)) * rng.normal(1, 0.04)
    image = paint(plain(*dye), (0.68, 0.71, 0.76), np.where(warp_on_top, 0.0, 0.55))
    tone = 0.62 + 0.42 * round_yarn + yarn_shade + 0.05 * noise(rng, (4, 0.7))
    return ndimage.gaussian_filter(image * tone[..., None], (0.5, 0.5, 0)), EVERYWHERE


def wood(rng):
    """Streaky grain along y; ring spacing, bend and colour change from board to board."""
    bend = X + 4 * noise(rng, (35, 14)) + rng.uniform(0, 60)
    rings = np.sin(2 * np.pi * bend / rng.uniform(16, 26)) + 0.5 * np.sin(bend / 1.7)
    fibres = 0.20 * noise(rng, (22, 1.0)) + 0.10 * noise(rng, (7, 0.6))
    dark = np.clip(0.45 + 0.20 * rings + fibres, 0, 1)
    light_tone = np.array((0.82, 0.62, 0.40)) * rng.normal(1, 0.05)
    image = paint(plain(*light_tone), np.array((0.46, 0.28, 0.15)) * rng.normal(1, 0.05, 3), dark)
    pores = cover(2.1 - noise(rng, (3.5, 0.6)), soft=0.8)
    return paint(image, (0.25, 0.14, 0.08), 0.6 * pores), EVERYWHERE


def granite(rng):
    """Speckle of four minerals in random proportions, sizes and tints: the most random class."""
    minerals = np.array([(0.74, 0.72, 0.70), (0.58, 0.55, 0.54),
                         (0.68, 0.55, 0.50), (0.33, 0.32, 0.33)])
    sizes = rng.uniform(1.7, 2.0, 4)
    fields = [noise(rng, size) + rng.normal(0, 0.10) for size in sizes]
    share = np.exp(4 * np.stack(fields, -1))      # soft arg-max, so crystals get smooth borders
    share /= share.sum(-1, keepdims=True)
    tint = rng.normal(1, 0.04, 3)
    return share @ (minerals * tint) * (1 + 0.07 * noise(rng, 0.7)[..., None]), EVERYWHERE


def washer(rng):
    """Turned steel ring, always centred: only the highlight and the tool marks differ."""
    x, y = X - rng.normal(0, 0.7), Y - rng.normal(0, 0.7)
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    alpha = cover(r - 50) * cover(24 - r)
    marks = ndimage.gaussian_filter1d(rng.standard_normal(400), 1.2)
    shine = np.cos(2 * (angle - rng.normal(0.8, 0.12))) ** 3
    tone = 0.56 + 0.14 * shine + 0.05 * np.interp(r * 4, np.arange(400), marks)
    bevel = np.exp(-((r - 47.5) / 1.5) ** 2) - np.exp(-((r - 26.5) / 1.5) ** 2)
    tone += 0.22 * bevel * np.cos(angle + 2.3)   # outer and inner edge face opposite directions
    background = with_shadow(plain(0.30, 0.33, 0.37), alpha)
    return paint(background, tone[..., None] * (0.98, 1.0, 1.03), alpha), alpha > 0.5


def pill(rng):
    """Two-coloured capsule in any orientation, lit from the upper left."""
    turn, radius, half = rng.uniform(0, 2 * np.pi), 23, 25
    x, y = X - rng.normal(0, 1.5), Y - rng.normal(0, 1.5)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    cap = np.sign(u) * np.maximum(np.abs(u) - half, 0)       # distance into the round ends
    alpha = cover(np.hypot(cap, v) - radius)
    nx = (cap * np.cos(turn) - v * np.sin(turn)) / radius    # surface normal, in image axes
    ny = (cap * np.sin(turn) + v * np.cos(turn)) / radius
    nz = np.sqrt(np.clip(1 - nx ** 2 - ny ** 2, 0, 1))
    diffuse = np.clip(0.75 * nz - 0.42 * nx - 0.50 * ny, 0, 1)
    shell = np.array(((0.78, 0.28, 0.20), (0.90, 0.84, 0.70))) * rng.normal(1, 0.015, (2, 1))
    colour = paint(plain(*shell[0]), shell[1], cover(u))
    colour = colour * (1 - 0.25 * np.exp(-(u / 1.3) ** 2))[..., None]          # seam
    surface = colour * (0.42 + 0.62 * diffuse)[..., None] + 0.45 * diffuse[..., None] ** 24
    background = with_shadow(plain(0.52, 0.60, 0.66), alpha)
    return paint(background, surface, alpha), alpha > 0.5


def circuit(rng):
    """Small board with a fixed layout; the parts vary in shade and sit slightly off their pads."""
    x, y = X - rng.normal(0, 0.4), Y - rng.normal(0, 0.4)
    board = cover(box(x, y, 114, 114, corner=5))
    image = paint(with_shadow(plain(0.62, 0.60, 0.57), board), (0.10, 0.34, 0.22), board)
    for i, row in enumerate(range(-18, 19, 6)):
        for side in (-1, 1):
            lane = row * 2.3 if i % 2 else row        # every second trace fans out to the edge
            image = draw_trace(image, side * x, y, row, lane)
    chip = plain(0.15, 0.15, 0.17) * (1 - 0.004 * (X + Y))[..., None]
    image = paint(image, chip, cover(box(x - rng.normal(0, 0.3), y, 32, 44)))
    image = paint(image, (0.32, 0.32, 0.34), cover(np.hypot(x + 10, y + 16) - 2.2))
    for px, py in [(-36, -48), (-12, -48), (12, -48), (36, -48), (-24, 48), (0, 48), (24, 48)]:
        dx, dy = x - px - rng.normal(0, 0.25), y - py - rng.normal(0, 0.25)
        image = paint(image, (0.82, 0.82, 0.80), cover(box(dx, dy, 16, 8)))    # solder
        body = np.array((0.62, 0.47, 0.32) if py > 0 else (0.20, 0.21, 0.24))
        body = body * rng.normal(1, 0.06) * (1 - 0.05 * dy[..., None])
        image = paint(image, body, cover(box(dx, dy, 10, 8.6)))
    return image, board > 0.5


def draw_trace(image, x, y, row, lane):
    """One chip pin at height `row`, its copper trace, and the pad where it ends at `lane`."""
    height = row + (lane - row) * np.clip((x - 22) / 10, 0, 1)
    trace = cover(np.abs(y - height) - 1, soft=1.2) * cover(box(x - 34, y, 40, 120))
    image = paint(image, (0.30, 0.56, 0.34), trace)
    image = paint(image, (0.80, 0.78, 0.70), cover(box(x - 19, y - row, 7, 2.6)))
    return paint(image, (0.80, 0.66, 0.34), cover(np.hypot(x - 50, y - lane) - 2.4))


def cookie(rng):
    """Irregular outline, random chips and crumb: an object class that is hard to predict."""
    x, y = X - rng.normal(0, 1.5), Y - rng.normal(0, 1.5)
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    waves = [rng.normal(0, 1.8 / k ** 0.5) * np.cos(k * angle + rng.uniform(0, 7))
             for k in range(2, 9)]
    distance = r - rng.normal(48, 1.5) - sum(waves)
    alpha = cover(distance)
    dome = 7 * np.sqrt(np.clip(-distance / 40, 0, 1))
    height = dome + 0.5 * noise(rng, 2.5) + 0.28 * noise(rng, 1)
    crust = np.array((0.76, 0.55, 0.32)) * rng.normal(1, 0.03, 3)
    baked = np.clip(np.exp(distance / 7) + 0.15 * noise(rng, 5), 0, 1)     # darker near the rim
    image = paint(plain(*crust), 0.62 * crust, baked)
    for _ in range(rng.integers(6, 11)):
        chip = chocolate(rng, rng.choice(np.argwhere(distance < -7)))
        image, height = paint(image, (0.26, 0.15, 0.10), chip), height + 1.2 * chip
    slope = sum(ndimage.gaussian_filter(height, 0.6, order=order) for order in ((0, 1), (1, 0)))
    background = with_shadow(plain(0.80, 0.79, 0.75), alpha)
    return paint(background, image * (1 + 0.36 * slope)[..., None], alpha), alpha > 0.5


def chocolate(rng, centre):
    """Opacity of one lobed chocolate chip at the pixel `centre` (row, column)."""
    y, x = Y - Y[centre[0], 0], X - X[0, centre[1]]
    lobes = np.sin(rng.integers(2, 5) * np.arctan2(y, x) + rng.uniform(0, 7))
    return cover(np.hypot(x, y) - rng.uniform(3, 5.5) * (1 + 0.15 * lobes), soft=1.5)


# ==== the defects: defect(image, object mask, rng, strength) -> (image, defect mask) ===========

def blend(image, changed, alpha):
    """Lay `changed` over the image; the mask is where the defect is opaque enough to count."""
    return paint(image, changed, alpha), alpha > MASK_ALPHA


def patch(target, rng, share, soft=5.0, centre=None):
    """Opacity of a ragged patch that covers about `share` of the target's pixels."""
    cy, cx = rng.choice(np.argwhere(target)) if centre is None else centre
    score = np.hypot(Y - Y[cy, cx], X - X[cy, cx]) + 4 * noise(rng, 7)
    return cover(score - np.quantile(score[target], share), soft) * target


def line(target, rng, length, width, wander):
    """Opacity of a thin line centred inside the target; `wander` bends it (radians a step)."""
    inside = ndimage.binary_erosion(target, iterations=8)
    start = rng.choice(np.argwhere(inside))[::-1]
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, wander, int(length / 2)))
    points = 2 * np.cumsum(np.stack([np.cos(heading), np.sin(heading)], -1), 0)
    points += start - points.mean(0)
    canvas = Image.new("L", (4 * SIZE, 4 * SIZE))            # drawn at 4x, then averaged
    ImageDraw.Draw(canvas).line([tuple(p) for p in 4 * points], fill=255, width=round(4 * width))
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX)) / 255 * target


def scratch(image, target, rng, strength):
    """Hair-thin bright or dark line, relative to the local colour so that it fits any class."""
    alpha = line(target, rng, rng.uniform(40, 80), rng.uniform(1.2, 2.0), wander=0.12)
    local = ndimage.gaussian_filter(image, (2, 2, 0))
    return blend(image, local * (1 + strength * rng.choice((-1, 1))), alpha)


def fibre(image, target, rng, strength):
    """Curled foreign fibre, in a grey that stands off from the local colour by `strength`."""
    alpha = line(target, rng, rng.uniform(35, 60), 2.2, wander=0.35)
    local = ndimage.gaussian_filter(image, (3, 3, 0)).mean(-1, keepdims=True)
    return blend(image, local + strength * np.where(local < 0.5, 1, -1), alpha)


def pits(image, target, rng, strength):
    """A few small holes, dark with a lit lower right rim."""
    inside = np.argwhere(ndimage.binary_erosion(target, iterations=6))
    distances = [np.hypot(Y - Y[cy, cx], X - X[cy, cx]) - rng.uniform(2, 5)
                 for cy, cx in rng.choice(inside, rng.integers(2, 5))]
    alpha = cover(np.min(distances, 0), soft=2.0) * target
    rim = ndimage.shift(alpha, (-1.5, -1.5), order=1) - alpha
    return blend(image, image * (1 - strength * (1 + rim))[..., None], alpha)


def stain(image, target, rng, strength):
    """Small brownish tint that leaves the texture visible."""
    return blend(image, image * (1 + strength * RUST), patch(target, rng, SMALL))


def discolour(image, target, rng, strength):
    """The same tint, but over a third of the object and with a wide soft border."""
    return blend(image, image * (1 + strength * RUST), patch(target, rng, LARGE, soft=10))


def bite(image, target, rng, strength):
    """Missing piece: the background shows through at the rim of the object."""
    rim = target & ~ndimage.binary_erosion(target, iterations=2)
    alpha = patch(target, rng, SMALL * strength, soft=2, centre=rng.choice(np.argwhere(rim)))
    return blend(image, np.median(image[~target], 0), alpha)


def missing(image, target, rng, strength):
    """Part not mounted: whatever stands out from the object's main colour is painted over."""
    main = np.median(image[target], 0)
    inside = ndimage.binary_erosion(target, iterations=3)      # the rim of the board is no part
    stands_out = inside & (np.abs(image - main).max(-1) > 0.1)
    area = patch(target, rng, SMALL * strength, soft=2, centre=rng.choice(np.argwhere(stands_out)))
    return blend(image, main, area * ndimage.binary_dilation(stands_out))


def bend(image, target, rng, strength):
    """Local displacement by up to `strength` pixels; colours and texture stay as they are."""
    amount, turn = patch(target, rng, 2 * SMALL, soft=14), rng.uniform(0, 2 * np.pi)
    shift = np.multiply.outer((np.sin(turn), np.cos(turn)), strength * amount)    # (2, H, W)
    at = np.indices((SIZE, SIZE)) + shift
    moved = [ndimage.map_coordinates(image[..., c], at, order=1, mode="mirror") for c in range(3)]
    return np.stack(moved, -1), amount > MASK_ALPHA


def melt(image, target, rng, strength):
    """A third of the object loses its texture: blurred by `strength` pixels."""
    flat = ndimage.gaussian_filter(image, (strength, strength, 0))
    return blend(image, flat, patch(target, rng, LARGE, soft=10))


def turned(image, target, rng, strength):
    """A third of the texture runs at a right angle to the rest; `strength` is the opacity."""
    return blend(image, np.rot90(image), strength * patch(target, rng, LARGE, soft=4))


def wrong_half(image, target, rng, strength):
    """One half replaced by the other, turned by 180 degrees; `strength` is the opacity."""
    centred = np.argwhere(target) - np.argwhere(target).mean(0)
    centred[:, 0] *= 1.02                        # a square board has no long axis: choose y
    long_axis = np.linalg.eigh(centred.T @ centred)[1][:, 1] * rng.choice((-1, 1))
    along = Y * long_axis[0] + X * long_axis[1]
    alpha = strength * cover(along - np.median(along[target])) * target
    return blend(image, np.rot90(image, 2), alpha)


# ==== which class has which defects, and how hard they are to see ==============================

CLASSES = {   # name: (render, uneven light, sensor noise, {defect: (function, strength)})
    "grid": (grid, 0.01, 0.008, {"cut": (scratch, 0.25), "oil": (stain, 0.15),
                                 "bent": (bend, 1.6), "melted": (melt, 1.0)}),
    "fabric": (fabric, 0.02, 0.012, {"pulled": (scratch, 0.7), "stain": (stain, 0.40),
                                     "lint": (fibre, 0.25), "worn": (melt, 1.8)}),
    "wood": (wood, 0.03, 0.012, {"scratch": (scratch, 0.8), "stain": (stain, 0.65),
                                 "hole": (pits, 0.9), "inlay": (turned, 1.0)}),
    "granite": (granite, 0.02, 0.012, {"crack": (scratch, 0.8), "stain": (stain, 0.8),
                                       "pit": (pits, 0.9), "weathered": (discolour, 0.6)}),
    "washer": (washer, 0.02, 0.008, {"scratch": (scratch, 0.40), "chipped": (bite, 1.0),
                                     "fibre": (fibre, 0.2), "rust": (discolour, 0.2)}),
    "pill": (pill, 0.02, 0.008, {"crack": (scratch, 0.7), "chipped": (bite, 1.5),
                                 "fibre": (fibre, 0.35), "wrong_half": (wrong_half, 1.0)}),
    "circuit": (circuit, 0.02, 0.010, {"cut": (scratch, 0.9), "missing": (missing, 2.0),
                                       "bridge": (fibre, 0.45), "wrong_half": (wrong_half, 1.0)}),
    "cookie": (cookie, 0.02, 0.012, {"crack": (scratch, 0.9), "bite": (bite, 2.5),
                                     "fibre": (fibre, 0.40), "burnt": (discolour, 0.6)}),
}


def photograph(image, rng, light, sensor):
    """What the camera adds to good and defective alike: exposure, uneven light, sensor noise."""
    gain = 1 + light * (rng.normal() + (rng.normal() * X + rng.normal() * Y) / SIZE)
    noisy = image * gain[..., None] + sensor * rng.standard_normal(image.shape)
    return Image.fromarray((255 * np.clip(noisy, 0, 1)).round().astype(np.uint8))


def write_class(root, name, seed):
    """Draw one class. Every image has its own generator, so no image depends on another."""
    render, light, sensor, defects = CLASSES[name]
    splits = [("train/good", N_TRAIN, None), ("test/good", N_GOOD, None)]
    splits += [(f"test/{kind}", N_DEFECT, defect) for kind, defect in defects.items()]
    for split_index, (split, count, defect) in enumerate(splits):
        folder = root / name / split
        folder.mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([seed, list(CLASSES).index(name), split_index, i])
            image, mask = render(rng)
            if defect:
                image, mask = defect[0](image, mask, rng, defect[1])
                write_mask(root / name / "ground_truth" / folder.name / f"{i:03d}_mask.png", mask)
            photo = photograph(image, rng, light, sensor)
            photo.save(folder / f"{i:03d}.jpg", quality=JPEG_QUALITY)


def write_mask(path, mask):
    """Save a bool mask as an 8-bit PNG with values 0 and 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path, optimize=True)


def make_demo(root, seed):
    """Draw the demo set (8 classes, 576 images).

    Writes into the empty folder `root` and returns what the marker file shall say.
    """
    for name in CLASSES:
        write_class(root, name, seed)
    return f"python data/prepare.py demo --seed {seed}\nProcedurally drawn. MIT licence.\n"


# ==== ELPV =====================================================================================

def elpv_folder():
    """Data folder of the installed elpv-dataset package, found without importing the package."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None:
        raise UserError("package elpv-dataset is not installed; run: pip install elpv-dataset")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    if not (folder / "labels.csv").is_file():
        raise UserError(f"{folder}/labels.csv is missing; run: "
                        "pip install --force-reinstall elpv-dataset")
    return folder


def make_elpv(root, seed):
    """Lay out the solar cells of the package elpv-dataset (2 classes, 2,223 images).

    Defect probability 0 is normal and 1 is defective; the doubtful 1/3 and 2/3 are left out.
    Writes into the empty folder `root` and returns what the marker file shall say.
    """
    source = elpv_folder()
    rows = [line.split() for line in (source / "labels.csv").read_text().splitlines() if line]
    for index, kind in enumerate(("mono", "poly")):
        normal, defective = ([source / file for file, probability, cell in sorted(rows)
                              if cell == kind and float(probability) == label] for label in (0, 1))
        order = np.random.default_rng([seed, index]).permutation(len(normal))
        n_test = round(TEST_SHARE * len(normal))
        copy([normal[i] for i in order[:n_test]], root / kind / "test" / "good")
        copy([normal[i] for i in order[n_test:]], root / kind / "train" / "good")
        copy(defective, root / kind / "test" / "defective")
    print("ELPV is licensed CC BY-NC-SA 4.0: non-commercial use only, never commit these images.")
    return f"python data/prepare.py elpv --seed {seed}\nLicence: CC BY-NC-SA 4.0. Do not commit.\n"


def copy(files, folder):
    """Copy files under their own names into a new folder."""
    folder.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


# ==== writing safely ===========================================================================

def check_target(out, force):
    """Refuse a target that would overwrite something, before any work is done."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise UserError(f"{out} is not empty; use --force to replace it, or another --out")
    marker = out / MARKER
    if not marker.is_file() or not marker.read_text(errors="replace").startswith(MARKER_LINE):
        raise UserError(f"{out} was not made by this script (no {MARKER}); --force will not delete "
                        "it, choose another --out")


def build(make, out, seed):
    """Fill a hidden sibling folder, then rename: an interrupted run leaves `out` as it was."""
    partial, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("new", "old"))
    partial.mkdir(parents=True)
    try:
        note = make(partial, seed)
        (partial / MARKER).write_text(f"{MARKER_LINE}\n{note}")
        if out.exists():
            out.rename(old)
        partial.rename(out)
    finally:
        if old.exists() and not out.exists():      # the second rename failed: undo the first
            old.rename(out)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def complain(message):
    """Print a one-line error; returns the exit code for a user's mistake."""
    print(f"prepare.py: error: {message}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """Prints one line on a wrong flag; argparse would print the usage above it."""

    def error(self, message):
        """Called by argparse with what is wrong."""
        sys.exit(complain(f"{message}; see --help"))


def seed_number(text):
    """Seeds are whole numbers from 0 up, as numpy's generator wants them."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 0")
    return int(text)


def summary(out):
    """One line about a finished tree: image and mask counts per split, size on disk."""
    files = [file for file in out.rglob("*") if file.is_file()]
    splits = [file.relative_to(out).parts[1] for file in files if file.name != MARKER]
    counts = ", ".join(f"{splits.count(split)} {label}" for split, label in (
        ("train", "train images"), ("test", "test images"), ("ground_truth", "masks")))
    classes = len([folder for folder in out.iterdir() if folder.is_dir()])
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    return f"{out}: {classes} classes, {counts}, {megabytes:.1f} MB"


def parse_args():
    """The command line; args.make is the function that fills the folder."""
    parser = Parser(prog="prepare.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="{demo,elpv}")
    for name, make in (("demo", make_demo), ("elpv", make_elpv)):
        sub = commands.add_parser(name, help=make.__doc__.splitlines()[0])
        sub.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / name,
                         help="folder to write (default: %(default)s)")
        sub.add_argument("--seed", type=seed_number, default=0, help="default: %(default)s")
        sub.add_argument("--force", action="store_true", help="replace a tree this script made")
        sub.set_defaults(make=make)
    return parser.parse_args()


def main():
    """Run one command; what the user can repair ends in one line and exit code 2."""
    args = parse_args()
    out = args.out.resolve()
    try:
        check_target(out, args.force)
        build(args.make, out, args.seed)
        print(summary(out))
    except UserError as error:
        sys.exit(complain(error))
    except OSError as error:      # unwritable folder, full disk, ...
        reason, file = error.strerror or error, error.filename or out
        sys.exit(complain(f"{file}: {reason}; check this path, its rights and the free space"))
    except KeyboardInterrupt:
        sys.exit(complain(f"interrupted; {out} is as it was before"))


if __name__ == "__main__":
    main()
