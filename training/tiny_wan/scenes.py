"""The world the tiny Wan knows: coloured shapes that move over plain backgrounds, and the words for them.

A `Scene` is drawn by signed distance functions, so a clip is exact, antialiased and costs microseconds on a GPU. Every
eighth combination of colour, shape and motion is held out: no training clip, of one object or two, ever shows it.
"""

import math
import random
from dataclasses import dataclass

import torch

HEIGHT = WIDTH = 128
NUM_FRAMES = 17

COLOURS = {
    "red": (226, 36, 40),
    "orange": (246, 140, 20),
    "yellow": (250, 226, 44),
    "green": (44, 190, 60),
    "cyan": (50, 214, 226),
    "blue": (64, 104, 250),
    "pink": (244, 96, 190),
    "white": (246, 246, 246),
}
BACKGROUNDS = {"black": (8, 8, 8), "gray": (112, 112, 112), "dark blue": (16, 22, 84), "dark green": (10, 66, 34)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": (12.0, 15.0), "medium": (19.0, 22.0), "large": (27.0, 30.0)}  # radius in pixels of a 128 x 128 frame
MOTIONS = {
    "left": ("moves left", "slides to the left", "drifts left", "travels left"),
    "right": ("moves right", "slides to the right", "drifts right", "travels right"),
    "up": ("moves up", "rises", "floats up", "goes upward"),
    "down": ("moves down", "falls", "sinks down", "goes downward"),
    "grow": ("grows", "gets bigger", "expands"),
    "shrink": ("shrinks", "gets smaller", "contracts"),
    "bounce": ("bounces", "jumps up and down", "hops"),
    "turn": ("turns", "rotates", "spins"),
}
SIZE_WORDS = {
    "small": ("small", "tiny", "little"),
    "medium": ("medium", "medium sized"),
    "large": ("large", "big", "huge"),
}
PLACES = ("over a {} background", "on a {} background", "against a {} background", "in front of a {} background")


@dataclass(frozen=True)
class Thing:
    """One object: what it is, and the numbers that place it (pixels, radians) once it is drawn."""

    colour: str
    shape: str
    motion: str
    size: str

    @property
    def combination(self) -> tuple[str, str, str]:
        return self.colour, self.shape, self.motion


@dataclass(frozen=True)
class Scene:
    """What a caption says: a background and one object, or a left and a right one."""

    background: str
    things: tuple[Thing, ...]


def is_held_out(combination) -> bool:
    """Whether a (colour, shape, motion) is kept from training: one in eight, spread over all three axes."""
    colour, shape, motion = combination
    c, s, m = list(COLOURS).index(colour), SHAPES.index(shape), list(MOTIONS).index(motion)
    return (c + 3 * s + 5 * m) % 8 == 0


def is_visible(combination) -> bool:
    """A circle that turns looks like one that rests, so no scene asks for it."""
    return combination[1:] != ("circle", "turn")


COMBINATIONS = [(c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS if is_visible((c, s, m))]
TRAINED = [c for c in COMBINATIONS if not is_held_out(c)]
HELD_OUT = [c for c in COMBINATIONS if is_held_out(c)]


def draw_scene(rng: random.Random, combinations=TRAINED, two_objects: float = 0.25) -> Scene:
    """A random scene whose objects come from `combinations`."""
    background = rng.choice(list(BACKGROUNDS))
    if rng.random() >= two_objects:
        return Scene(background, (Thing(*rng.choice(combinations), rng.choice(list(SIZES))),))
    things = [Thing(*rng.choice(combinations), rng.choice(("small", "medium"))) for _ in range(2)]
    while things[1].colour == things[0].colour:
        things[1] = Thing(*rng.choice(combinations), rng.choice(("small", "medium")))
    return Scene(background, tuple(things))


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene in words: the plain form without `rng`, a varied wording with it."""
    pick = rng.choice if rng else (lambda words: words[0])
    phrases = [f"a {pick(SIZE_WORDS[t.size])} {t.colour} {t.shape} {pick(MOTIONS[t.motion])}" for t in scene.things]
    if len(phrases) == 1:
        text = f"{phrases[0]} {pick(PLACES).format(scene.background)}"
    else:
        left, right = phrases
        joint = pick((" on the left and {} on the right", " on the left, {} on the right"))
        text = f"{left}{joint.format(right)} {pick(PLACES).format(scene.background)}"
    if rng and rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if rng and rng.random() < 0.3 else text


def words() -> list[str]:
    """Every word a caption can use: the whole vocabulary of the tokenizer beside letters and punctuation."""
    phrases = [*COLOURS, *BACKGROUNDS, *SHAPES, *PLACES, "on the left and on the right", "a A"]
    phrases += [p for group in (*MOTIONS.values(), *SIZE_WORDS.values()) for p in group]
    return sorted({w.strip("{},.") for p in phrases for w in p.split()} - {""})


def place(scene: Scene, rng: random.Random, num_frames: int = NUM_FRAMES) -> torch.Tensor:
    """The path of every object: [2, num_frames, 4] of centre x, centre y, radius (pixels), angle (radians).

    A missing second object has radius 0. Directions travel 44-56 pixels (26-34 in a half), growth is 0.6 -> 1.3,
    a bounce is two hops, a turn is 160-200 degrees clockwise.
    """
    t = torch.linspace(0, 1, num_frames)
    paths = torch.zeros(2, num_frames, 4)
    for i, thing in enumerate(scene.things):
        alone = len(scene.things) == 1
        radius = rng.uniform(*SIZES[thing.size]) * (1.0 if alone else 0.8)
        travel = rng.uniform(44, 56)
        across = travel if alone else rng.uniform(22, 28)
        x = 64.0 + rng.uniform(-4, 4) if alone else (33.0, 95.0)[i] + rng.uniform(-2, 2)
        y = 64.0 + rng.uniform(-4, 4)
        ones = torch.ones_like(t)
        cx, cy, r, angle = x * ones, y * ones, radius * ones, 0 * ones
        if thing.motion in ("left", "right"):
            cx = x + across * (t - 0.5) * (1 if thing.motion == "right" else -1)
        elif thing.motion in ("up", "down"):
            cy = y + travel * (t - 0.5) * (1 if thing.motion == "down" else -1)
        elif thing.motion == "grow":
            r = radius * (0.6 + 0.7 * t)
        elif thing.motion == "shrink":
            r = radius * (1.3 - 0.7 * t)
        elif thing.motion == "bounce":
            cy = y + 20 - 40 * (2 * math.pi * t).sin().abs()
        elif thing.motion == "turn":
            angle = math.radians(rng.uniform(160, 200)) * t
        paths[i] = torch.stack([cx, cy, r, angle], -1)
    return paths


def distance(shape: str, x, y, r):
    """Signed distance in pixels (negative inside) of an upright `shape` of radius r at the origin, y down."""
    if shape == "circle":
        return (x * x + y * y).sqrt() - r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.84 * r
    if shape == "triangle":
        s = math.sqrt(3) / 2
        return torch.maximum(torch.maximum(y, s * x - y / 2), -s * x - y / 2) - 0.55 * r
    if shape == "cross":
        a, b = 0.98 * r, 0.33 * r
        return torch.minimum(torch.maximum(x.abs() - a, y.abs() - b), torch.maximum(x.abs() - b, y.abs() - a))
    # star: fold the plane into one tenth, then the distance to the edge from tip to notch
    sector = math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - 2 * sector * torch.round(angle / (2 * sector))).abs()
    rho = (x * x + y * y).sqrt()
    px, py = rho * angle.cos(), rho * angle.sin()
    tip, notch = 1.12 * r, 0.46 * r
    nx, ny = notch * math.sin(sector), tip - notch * math.cos(sector)  # normal of the edge, pointing out
    return ((px - tip) * nx + py * ny) / (nx * nx + ny * ny) ** 0.5


def render(scenes: list[Scene], paths: torch.Tensor, device="cpu") -> torch.Tensor:
    """Clips of these scenes: [B, 3, num_frames, 128, 128] fp32 in [0, 1]; `paths` is [B, 2, num_frames, 4]."""
    paths = paths.to(device)
    batch, _, num_frames, _ = paths.shape
    table = lambda colours, names: torch.tensor([colours[n] for n in names], device=device) / 255
    clip = table(BACKGROUNDS, [s.background for s in scenes]).view(batch, 3, 1, 1, 1)
    clip = clip.expand(batch, 3, num_frames, HEIGHT, WIDTH).clone()
    axis = torch.arange(HEIGHT, device=device) + 0.5
    for i in range(2):
        for shape in SHAPES:
            rows = [b for b, s in enumerate(scenes) if len(s.things) > i and s.things[i].shape == shape]
            if not rows:
                continue
            index = torch.tensor(rows, device=device)
            cx, cy, r, angle = (p[..., None, None] for p in paths[index, i].unbind(-1))
            dx, dy = axis.view(1, 1, 1, -1) - cx, axis.view(1, 1, -1, 1) - cy
            x, y = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
            cover = (0.5 - distance(shape, x, y, r)).clamp(0, 1).unsqueeze(1)
            paint = table(COLOURS, [scenes[b].things[i].colour for b in rows]).view(-1, 3, 1, 1, 1)
            clip[index] = clip[index] * (1 - cover) + paint * cover
    return clip


def batch(size: int, seed: int, device="cpu", combinations=TRAINED, two_objects: float = 0.25, varied: bool = True):
    """`size` random scenes with their captions and clips: (scenes, captions, [size, 3, 17, 128, 128] in [0, 1])."""
    rng = random.Random(seed)
    scenes = [draw_scene(rng, combinations, two_objects) for _ in range(size)]
    captions = [caption(s, rng if varied else None) for s in scenes]
    paths = torch.stack([place(s, rng) for s in scenes])
    return scenes, captions, render(scenes, paths, device)
