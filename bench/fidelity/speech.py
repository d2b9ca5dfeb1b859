"""Voice activity: synthesised speech among pauses, noise and tones, and what a network says of it.

The voice is formant-wave synthesis: every glottal pulse sets off damped oscillations at the vowel's
formants; fricatives are noise in a band. Source: X. Rodet, "Time-domain formant-wave-function
synthesis", Computer Music Journal 8(3), 1984; formants of vowels: Peterson and Barney, JASA 24,
1952.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone.bench.fidelity.common import Network, Split, run, seed

Wave = NDArray[np.float64]

RATE = 16_000
FRAME, CONTEXT = 512, 64
SPEECH = 0.5
"""The probability from which a frame counts as speech."""

# Hz, of men's voices.
_VOWELS = {
    "i": (270, 2290, 3010, 3500),
    "e": (530, 1840, 2480, 3500),
    "a": (730, 1090, 2440, 3400),
    "o": (570, 840, 2410, 3400),
    "u": (300, 870, 2240, 3400),
    "r": (490, 1350, 1690, 3300),
}
_WIDTHS = np.array([60.0, 90.0, 130.0, 180.0])
_LOUDNESS = np.array([1.0, 0.6, 0.35, 0.2])
_PAUSE = 0.002


class Scene(NamedTuple):
    """Sound, and where in it there is speech."""

    wave: Wave
    voiced: NDArray[np.bool_]
    """For each frame, whether most of it is speech."""


@functools.cache
def scene(split: Split, seconds: float = 96.0) -> Scene:
    """Phrases of speech, and between them near silence, noise or a hum of tones."""
    random = np.random.default_rng(seed(split, 71))
    waves: list[Wave] = []
    voiced: list[NDArray[np.bool_]] = []
    while sum(map(len, waves)) < seconds * RATE:
        phrase = _phrase(random)
        other = _other(random, int(random.uniform(0.8, 1.6) * RATE))
        waves += [phrase, other]
        voiced += [np.ones(len(phrase), bool), np.zeros(len(other), bool)]
    frames = int(seconds * RATE) // FRAME
    wave = np.concatenate(waves)[: frames * FRAME]
    wave = wave + _PAUSE * random.normal(size=len(wave))
    inside = np.concatenate(voiced)[: frames * FRAME].reshape(frames, FRAME)
    return Scene(wave, inside.mean(1) > 0.5)


def inputs(wave: Wave) -> dict[str, Tensor]:
    """The frames of a sound as Silero VAD takes them, from a state of zeros."""
    frames = wave.astype(np.float32).reshape(-1, FRAME)
    before = np.zeros((len(frames), CONTEXT), np.float32)
    before[1:] = frames[:-1, -CONTEXT:]
    state = torch.zeros(1, 1, 128)
    joined = torch.from_numpy(np.concatenate([before, frames], axis=1))
    return {"input": joined, "h": state, "c": state}


def probabilities(network: Network, wave: Wave) -> NDArray[np.float32]:
    """The probability of speech of each frame."""
    found: NDArray[np.float32] = run(network, inputs(wave))["speech_probs"].detach().numpy()
    return found


def agreement(base: Network, changed: Network, split: Split = "held-out") -> float:
    """The share of frames on which both networks decide alike."""
    wave = scene(split).wave
    both = [probabilities(network, wave) >= SPEECH for network in (base, changed)]
    return float((both[0] == both[1]).mean())


def accuracy(network: Network, split: Split = "held-out") -> float:
    """The share of frames on which a network decides as the scene was made."""
    wave, voiced = scene(split)
    return float(((probabilities(network, wave) >= SPEECH) == voiced).mean())


def _phrase(random: np.random.Generator) -> Wave:
    """A few syllables of a vowel and a fricative, with a melody that falls."""
    syllables = int(random.integers(4, 9))
    pitch = random.uniform(95, 190)
    stretch = random.uniform(0.95, 1.2)
    parts: list[Wave] = []
    vowels = list(_VOWELS)
    at = _VOWELS[vowels[int(random.integers(len(vowels)))]]
    for index in range(syllables):
        to = _VOWELS[vowels[int(random.integers(len(vowels)))]]
        if random.random() < 0.5:
            parts.append(_fricative(random, random.uniform(0.05, 0.1)))
        fall = pitch * (1.15 - 0.3 * index / syllables)
        length = random.uniform(0.13, 0.24)
        formants = stretch * np.array([at, to], float)
        parts.append(_vowel(random, formants, fall, length))
        at = to
    wave = np.concatenate(parts)
    return 0.1 * wave / np.sqrt(np.mean(wave**2))


def _vowel(random: np.random.Generator, formants: Wave, pitch: float, seconds: float) -> Wave:
    """A glide from the first row of formants to the second."""
    samples = int(seconds * RATE)
    wave = np.zeros(samples + RATE // 20)
    time = np.arange(RATE // 20) / RATE
    # The response to a pulse rises in a millisecond, as a glottis closes.
    attack = np.minimum(time / 1e-3, 1) ** 2
    start = 0.0
    while start < samples:
        where = start / samples
        now = (1 - where) * formants[0] + where * formants[1]
        decay = np.exp(-np.pi * np.outer(_WIDTHS, time))
        pulse = (_LOUDNESS[:, None] * decay * np.sin(2 * np.pi * np.outer(now, time))).sum(0)
        envelope = np.sin(np.pi * min(max(where, 0.04), 0.96)) ** 0.4
        shimmer = 1 + 0.05 * random.normal()
        first = int(start)
        wave[first : first + len(time)] += envelope * shimmer * attack * pulse
        melody = pitch * (1 + 0.06 * np.sin(np.pi * where)) * (1 + 0.01 * random.normal())
        start += RATE / melody
    wave = wave[:samples]
    breath = 0.02 * random.normal(size=samples) * np.abs(wave).max()
    return wave + breath


def _fricative(random: np.random.Generator, seconds: float) -> Wave:
    samples = int(seconds * RATE)
    low = random.uniform(2500, 4500)
    noise = _band(random, samples, low, 7500)
    return 0.25 * noise / np.abs(noise).max() * np.hanning(samples)


def _other(random: np.random.Generator, samples: int) -> Wave:
    """What is no speech: near silence, a rumble, or a chord that is held."""
    kind = int(random.integers(3))
    if kind == 0:
        return np.zeros(samples)
    if kind == 1:
        noise = _band(random, samples, 50, random.uniform(300, 900))
        return 0.02 * noise / np.sqrt(np.mean(noise**2))
    time = np.arange(samples) / RATE
    tones = random.uniform(500, 3000, size=3)
    chord = np.sin(2 * np.pi * np.outer(tones, time) + random.uniform(0, 6, (3, 1)))
    return 0.02 * chord.sum(0) * np.hanning(samples) ** 0.2


def _band(random: np.random.Generator, samples: int, low: float, high: float) -> Wave:
    spectrum = np.fft.rfft(random.normal(size=samples))
    frequency = np.fft.rfftfreq(samples, 1 / RATE)
    spectrum[(frequency < low) | (frequency > high)] = 0
    return np.fft.irfft(spectrum, samples)
