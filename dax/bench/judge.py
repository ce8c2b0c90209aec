"""Whether a clip of the tiny model still shows what its caption says, where the judge of its training is at hand.

The judge (training/tiny_wan/judge.py) lives beside the package, not in it: it needs scikit-image and the source tree.
"""

from functools import cache
from itertools import product

PARTS = ("colour", "shape", "motion", "background", "all")


def judge_clips(prompts: list[str], clips: dict[str, list]) -> tuple[dict[str, dict[str, float]], str | None]:
    """({name: {part: per cent of its clips in which the judge reads it as the caption says}}, why not, or None).

    clips   {name: one clip [T, 128, 128, 3] uint8 per prompt}
    """
    try:
        from training.tiny_wan.judge import score
    except ImportError as error:
        return {}, f"judge: not at hand ({error}); run from the source tree with scikit-image installed"
    scenes = [captions().get(prompt) for prompt in prompts]
    if None in scenes:
        return {}, f"judge: {scenes.count(None)} of the prompts are not captions of the tiny model's world"
    shape = next(iter(clips.values()))[0].shape
    if shape[1:3] != (128, 128) or shape[0] < 5:
        return {}, f"judge: reads clips of 128 x 128 and 5 frames or more, not {shape[1]} x {shape[2]} and {shape[0]}"
    judged = {}
    for name, own in clips.items():
        scores = [score(clip, scene) for clip, scene in zip(own, scenes)]
        judged[name] = {part: 100 * sum(each[part] for each in scores) / len(scores) for part in PARTS}
    return judged, None


@cache
def captions() -> dict:
    """{plain caption: Scene} of every scene of one object."""
    from training.tiny_wan import scenes

    found = {}
    for background, (colour, shape, motion), size in product(scenes.BACKGROUNDS, scenes.COMBINATIONS, scenes.SIZES):
        scene = scenes.Scene(background, (scenes.Thing(colour, shape, motion, size),))
        found[scenes.caption(scene)] = scene
    return found
