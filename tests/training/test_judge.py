"""The judge reads drawn clips right and rejects other captions; held-out combinations stay out of training."""

import random

import pytest

from training.tiny_wan import scenes
from training.tiny_wan.judge import judge, score


def drawn(size, seed, two_objects):
    things, _, clips = scenes.batch(size, seed, two_objects=two_objects, combinations=scenes.COMBINATIONS)
    return things, (clips * 255).round().byte().permute(0, 2, 3, 4, 1).numpy()


@pytest.mark.parametrize("two_objects", [0.0, 1.0], ids=["one", "two"])
def test_reads_drawn_clips(two_objects):
    things, clips = drawn(100, 11, two_objects)
    assert sum(score(clip, scene)["all"] for clip, scene in zip(clips, things, strict=True)) >= 99


def test_rejects_shuffled_captions():
    things, clips = drawn(60, 12, 0.0)
    shuffled = things[1:] + things[:1]
    wrong = [
        (clip, scene)
        for clip, scene, own in zip(clips, shuffled, things, strict=True)
        if scene.things[0].combination != own.things[0].combination
    ]
    assert len(wrong) > 50
    assert not any(score(clip, scene)["all"] for clip, scene in wrong)


def test_sees_nothing_in_noise():
    noise = (scenes.torch.rand(17, 128, 128, 3) * 255).byte().numpy()
    assert all(v.motion is None or v.shape is None or v.colour is None for v in judge(noise)) or not judge(noise)


def test_training_never_shows_held_out():
    rng = random.Random(0)
    seen = {t.combination for _ in range(3000) for t in scenes.draw_scene(rng).things}
    assert seen == set(scenes.TRAINED)
    assert not seen & set(scenes.HELD_OUT)
    for part in range(3):  # every word is learnt, only the combinations are new
        assert {c[part] for c in scenes.HELD_OUT} == {c[part] for c in scenes.TRAINED}
