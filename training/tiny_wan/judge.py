"""Reads a clip back: colour, shape, motion and background of its object, from the pixels alone.

No network and no training: the background is the median of the border, the object what differs from it, the colour the
nearest of the palette in CIELAB, the shape the best-fitting silhouette over all rotations, the motion what its centre,
area and angle do over time.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from skimage import color, measure

from .scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, distance

GRID = 48
ANGLES = 36


@dataclass(frozen=True)
class Verdict:
    """What the judge sees; None for what it cannot read."""

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None


def _nearest(rgb, palette: dict) -> str:
    lab = color.rgb2lab(np.asarray(rgb, float)[None, None] / 255)[0, 0]
    table = color.rgb2lab(np.asarray(list(palette.values()), float)[None] / 255)[0]
    return list(palette)[int(((table - lab) ** 2).sum(1).argmin())]


@lru_cache
def _silhouettes() -> tuple[np.ndarray, np.ndarray]:
    """Silhouettes of unit area about their centroid, [shapes, angles, GRID, GRID], and their angles in radians."""
    axis = (torch.arange(GRID) + 0.5) / GRID * 3.2 - 1.6
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angles = np.arange(ANGLES) * (2 * np.pi / ANGLES)
    fine = (torch.arange(400) + 0.5) / 400 * 4 - 2
    fy, fx = torch.meshgrid(fine, fine, indexing="ij")
    masks = []
    for shape in SHAPES:
        inside = distance(shape, fx, fy, torch.tensor(1.0)) < 0
        scale = float((inside.sum() * (4 / 400) ** 2).sqrt())  # radius-1 units per root of the area
        ox, oy = float(fx[inside].mean()), float(fy[inside].mean())
        for a in angles:
            u, v = (x * np.cos(a) + y * np.sin(a)) * scale + ox, (y * np.cos(a) - x * np.sin(a)) * scale + oy
            masks.append((distance(shape, u, v, torch.tensor(1.0)) < 0).numpy())
    return np.stack(masks).reshape(len(SHAPES), ANGLES, GRID, GRID), angles


def _fit(mask: np.ndarray) -> np.ndarray:
    """Overlap (intersection over union) of a frame's mask with every silhouette: [shapes, angles]."""
    rows, cols = np.nonzero(mask)
    root = np.sqrt(len(rows))
    axis = ((np.arange(GRID) + 0.5) / GRID * 3.2 - 1.6) * root
    r = np.clip(np.round(rows.mean() + axis).astype(int), -1, mask.shape[0])
    c = np.clip(np.round(cols.mean() + axis).astype(int), -1, mask.shape[1])
    padded = np.pad(mask, 1)
    patch = padded[np.ix_(r + 1, c + 1)]
    masks, _ = _silhouettes()
    both = (masks & patch).sum((2, 3))
    return both / np.maximum((masks | patch).sum((2, 3)), 1)


def _turn(fits: np.ndarray) -> float:
    """Total clockwise turn in radians: the sum of the small rotations that best carry each frame to the next."""
    steps = np.arange(-3, 4)
    total = 0.0
    for before, after in zip(fits, fits[1:]):
        score = [float((np.roll(before, k) * after).sum()) for k in steps]
        k = int(np.argmax(score))
        if 0 < k < len(steps) - 1:
            low, mid, high = score[k - 1 : k + 2]
            total += steps[k] + 0.5 * (low - high) / (low - 2 * mid + high + 1e-12)
        else:
            total += steps[k]
    return total * 2 * np.pi / ANGLES


def _motion(masks: list[np.ndarray], fits: np.ndarray) -> str | None:
    centres = np.array([[m.nonzero()[1].mean(), m.nonzero()[0].mean()] for m in masks])
    areas = np.array([m.sum() for m in masks], float)
    growth = np.log(areas[-3:].mean() / areas[:3].mean())
    if abs(growth) > 0.55:
        return "grow" if growth > 0 else "shrink"
    dx, dy = centres[-1] - centres[0]
    rises = np.abs(np.diff(centres[:, 1])).sum()
    if rises > 60 and abs(dy) < 0.4 * rises:
        return "bounce"
    if max(abs(dx), abs(dy)) > 14:
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"
    centred = fits - fits.mean(1, keepdims=True)
    if abs(_turn(centred)) > 1.2:
        return "turn"
    return None


def judge(clip: np.ndarray) -> list[Verdict]:
    """The objects of a clip, left to right.

    clip      [F, H, W, 3]  uint8, 128 x 128 with one object, or two side by side
    returns   one Verdict per object found (usually one or two; an empty list for an empty clip)
    About 0.1 s a clip on one core.
    """
    clip = np.asarray(clip)
    border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], 1).reshape(-1, 3)
    ground = np.median(border, 0)
    background = _nearest(ground, BACKGROUNDS)
    lab = color.rgb2lab(clip / 255.0)
    away = np.sqrt(((lab - color.rgb2lab(ground[None, None] / 255)[0, 0]) ** 2).sum(-1))
    foreground = away > 24

    labels = measure.label(foreground.max(0))  # what each object sweeps over
    regions = sorted(measure.regionprops(labels), key=lambda region: -region.area)
    regions = [r for r in regions[:2] if r.area > 150]
    verdicts = []
    for region in sorted(regions, key=lambda r: r.centroid[1]):
        masks = [f & (labels == region.label) for f in foreground]
        if min(m.sum() for m in masks) < 40:
            verdicts.append(Verdict(None, None, None, background))
            continue
        strong = np.stack(masks) & (away > 0.7 * np.percentile(away[np.stack(masks)], 90))
        colour = _nearest(np.median(clip[strong], 0), COLOURS)
        fits = np.stack([_fit(m) for m in masks])  # [frames, shapes, angles]
        shape = int(fits.max(2).mean(0).argmax())
        verdicts.append(Verdict(colour, SHAPES[shape], _motion(masks, fits[:, shape]), background))
    return verdicts


def score(clip: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Which parts of `scene` the judge reads in `clip`: colour, shape, motion, background, all."""
    verdicts = judge(clip)
    right = {part: len(verdicts) == len(scene.things) for part in ("colour", "shape", "motion", "background")}
    for verdict, thing in zip(verdicts, scene.things):
        for part in ("colour", "shape", "motion"):
            right[part] &= getattr(verdict, part) == getattr(thing, part)
        right["background"] &= verdict.background == scene.background
    return right | {"all": all(right.values())}
