"""What the training pictures are called: a small grammar of things, styles, light and angle.

In: a noun or a digit, what is known of the picture, a `random.Random`. Out: one caption.
"""

import random
from collections.abc import Iterable, Sequence

from jobs.embedded_models.wordnet import Noun

LIGHT = {
    "dark": ("at night", "in dim light", "in the dark", "in low light", "in deep shadow",
             "under a dark sky"),
    "bright": ("in bright daylight", "in bright light", "under the midday sun",
               "in strong sunlight", "brightly lit", "under studio lights"),
    "warm": ("at sunset", "in warm golden light", "at golden hour", "by candlelight", "at dawn",
             "in warm evening light"),
    "cool": ("in cool blue light", "on an overcast day", "under moonlight", "in the blue hour",
             "under fluorescent light"),
    "plain": ("in soft light", "in natural light", "in diffuse light", "in even light",
              "on a cloudy day"),
}  # fmt: skip
COLOURS = {
    "black": (20, 20, 20), "white": (238, 238, 238), "gray": (128, 128, 128),
    "red": (190, 40, 40), "orange": (225, 130, 40), "yellow": (228, 208, 66),
    "green": (62, 132, 62), "blue": (60, 100, 190), "light blue": (158, 198, 232),
    "purple": (122, 62, 152), "brown": (112, 76, 46), "beige": (205, 186, 152),
    "pink": (230, 150, 170), "dark green": (34, 62, 36), "dark blue": (22, 32, 72),
}  # fmt: skip
CLOSE = ("close-up", "from close up", "macro shot", "filling the frame", "tight framing")
WIDE = ("wide shot", "seen from afar", "wide-angle view", "full view")
STYLES = {  # the filter in filters.py, and how a caption may call it
    "sketch": ("pencil sketch", "pencil drawing", "line drawing", "ink drawing",
               "graphite sketch"),
    "charcoal": ("charcoal drawing", "charcoal sketch", "etching", "lithograph"),
    "bw": ("black and white photograph", "monochrome photo", "film noir still",
           "silver gelatin print"),
    "sepia": ("sepia photograph", "vintage photograph", "daguerreotype", "old postcard"),
    "watercolor": ("watercolor painting", "watercolour", "gouache painting",
                   "ink wash painting"),
    "oil": ("oil painting", "impressionist painting", "renaissance painting",
            "acrylic painting", "baroque painting"),
    "pixel": ("pixel art", "8-bit pixel art", "video game sprite", "low resolution pixel art"),
    "pop": ("pop art poster", "screen print", "pop art", "stencil graffiti", "poster art"),
    "blueprint": ("blueprint", "cyanotype", "technical blueprint drawing"),
    "neon": ("neon art", "glowing neon outline", "synthwave art", "light painting"),
    "comic": ("comic book illustration", "cartoon", "anime illustration",
              "children's book illustration", "cel shaded art"),
    "mosaic": ("mosaic", "stained glass", "cubist painting", "tile mosaic"),
    "emboss": ("stone relief", "clay sculpture", "bronze relief", "embossed metal"),
    "woodcut": ("woodcut print", "linocut", "ukiyo-e woodblock print", "block print"),
    "pastel": ("pastel drawing", "crayon drawing", "chalk pastel drawing",
               "colored pencil drawing"),
    "pointillist": ("pointillist painting", "halftone print", "pointillism",
                    "newspaper print"),
}  # fmt: skip
STYLE_FORMS = (
    "a {style} of {thing}",
    "{thing}, {style}",
    "{thing} in the style of a {style}",
    "{style} of {thing}",
    "{thing}, in {style} style",
)
PHOTO_FORMS = (
    "a photo of {thing}",
    "a photograph of {thing}",
    "a picture of {thing}",
    "{thing}",
    "an image of {thing}",
    "a good photo of {thing}",
    "photo of {thing}",
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def article(name: str, rng: random.Random) -> str:
    """`name` with "a" or "an"; half of the proper names go without."""
    proper = name[0].isupper() and len(name) > 1 and name[1].islower()
    if proper and rng.random() < 0.5:
        return name
    return ("an " if name[0].lower() in "aeiou" else "a ") + name


def nearest_colour(rgb: Iterable[float]) -> str:
    """The name in `COLOURS` that is nearest to a colour in 0..255."""
    rgb = tuple(rgb)

    def distance(name: str) -> float:
        return sum((a - b) ** 2 for a, b in zip(COLOURS[name], rgb, strict=True))

    return min(COLOURS, key=distance)


def light_of(mean_rgb: Iterable[float]) -> str:
    """The key of `LIGHT` that fits a picture's mean colour in 0..255."""
    red, green, blue = mean_rgb
    luminance = 0.3 * red + 0.59 * green + 0.11 * blue
    if luminance < 62:
        return "dark"
    if red - blue > 42:
        return "warm"
    if blue - red > 22:
        return "cool"
    return "bright" if luminance > 168 else "plain"


def noun_phrase(noun: Noun, rng: random.Random) -> str:
    """A class by its name, often with its gloss or kind, sometimes by these alone."""
    name = article(rng.choice(noun.lemmas[:3]), rng)
    draw = rng.random()
    if noun.gloss and draw < 0.30:
        return f"{name}, {noun.gloss}"
    if noun.hypernyms and draw < 0.50:
        return f"{name}, a kind of {rng.choice(noun.hypernyms[:5])}"
    if noun.hypernyms and draw < 0.56:
        return article(rng.choice(noun.hypernyms[:4]), rng)
    if noun.gloss and draw < 0.62:
        return noun.gloss
    return name


def digit_gloss(digit: int) -> str:
    """WordNet's manner of defining a digit, so that CLIP can tell such meanings apart."""
    if digit == 0:
        return "the mathematical symbol denoting absence of any quantity"
    if digit == 1:
        return "the smallest whole number"
    return f"the cardinal number that is the sum of {DIGITS[digit - 1]} and one"


def digit_phrase(digit: int, rng: random.Random) -> str:
    """A digit by its word or figure, often with its gloss or kind."""
    word, figure, gloss = DIGITS[digit], str(digit), digit_gloss(digit)
    return rng.choice(
        (
            f"the digit {word}",
            f"the digit {figure}",
            f"the number {word}",
            f"the number {figure}",
            f"the numeral {figure}",
            f"a {word}",
            word,
            f"a {word}, the number {figure}",
            f"a {word}, {gloss}",
            f"{word}, the digit {figure}",
            f"a {word}, a numeral",
            f"the figure {figure}",
            f"a {word}, a number, the digit {figure}",
            f"a {word}, a cardinal number",
            f"a {word}, the numeral for {word}",
            gloss,
            f"a {word}, a digit",
            f"a {word}, a number",
            f"a handwritten {word}, a digit",
        )
    )


def caption(
    thing: str, details: Sequence[str], rng: random.Random, *, style: str | None = None
) -> str:
    """A whole caption: the thing in some form, then up to three of its details in any order.

    Args:
        thing: a noun phrase.
        details: surface, light, angle; empty ones are left out.
        rng: where the choices come from.
        style: a key of `STYLES`, or None for a photograph.
    """
    if style is None:
        text = rng.choice(PHOTO_FORMS).format(thing=thing)
    else:
        text = rng.choice(STYLE_FORMS).format(style=rng.choice(STYLES[style]), thing=thing)
    kept = rng.sample(list(details), len(details))
    kept = [detail for detail in kept if detail][: rng.choice((0, 1, 2, 2, 3, 3))]
    return ", ".join([text, *kept])
