"""The world the miniatures know: some 250 concrete things, one small picture and many captions each.

The pictures are Microsoft's Fluent emoji in their 3D style and the tags are emojibase's, both MIT and
both on npm.  A data folder holds the two packages, unpacked side by side:

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf … --one-top-level=fluent-emoji-3d
    npm pack emojibase-data@17.0.0          && tar xzf … --one-top-level=emojibase-data
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

SIZE: Final = 64

# One theme a line.  "name" is emojibase's label, or "name=label" where the label is not what one would say.
# Left out on purpose: whatever comes in a dozen near-identical colours or angles (clocks, moons, hearts, flags).
_NAMES: Final = """
cat=cat face, dog=dog face, monkey=monkey face, wolf, fox, raccoon, lion, tiger=tiger face, horse, unicorn, zebra
deer, cow=cow face, pig=pig face, giraffe, elephant, rhinoceros, mouse=mouse face, rabbit=rabbit face
hedgehog, bear, polar bear, koala, panda, sloth, kangaroo, rooster, chick=baby chick, penguin
eagle, duck, swan, owl, flamingo, peacock, parrot, feather, frog, crocodile, turtle, snake, dragon, dinosaur=sauropod
whale=spouting whale, dolphin, fish, shark, octopus, crab, lobster
snail, butterfly, caterpillar=bug, bee=honeybee, ladybug=lady beetle, spider
bouquet, cherry blossom, rose, sunflower, tulip, seedling, potted plant, pine tree=evergreen tree
tree=deciduous tree, palm tree, cactus, four leaf clover, maple leaf, leaf=leaf fluttering in wind, mushroom
grapes, watermelon, orange=tangerine, lemon, banana, pineapple, red apple, green apple, pear, cherries
strawberry, blueberries, kiwi=kiwi fruit, tomato, coconut, avocado, eggplant, carrot, corn=ear of corn, hot pepper
cucumber, broccoli, garlic, onion, bread, croissant, pretzel, pancakes, cheese=cheese wedge, hamburger
french fries, pizza, hot dog, taco, popcorn, sushi, ice cream=soft ice cream
doughnut, cookie, birthday cake, cupcake, pie, candy, lollipop, honey pot, glass of milk
coffee=hot beverage, teapot, wine glass, beer=beer mug, bubble tea
earth=globe showing Europe-Africa, compass, mountain=snow-capped mountain, volcano, beach=beach with umbrella, desert
island=desert island, temple=classical building, wood, hut, house
office building, castle, tower=Tokyo tower, Statue of Liberty, church, mosque
tent, city=cityscape, sunrise=sunrise over mountains, sunset
bridge=bridge at night, ferris wheel, circus tent
train=locomotive, bullet train, bus, ambulance, fire engine, police car, taxi, car=automobile, tractor
racing car, motorcycle, bicycle, skateboard, wheel, traffic light=vertical traffic light
anchor, sailboat, ship=passenger ship, airplane, parachute, helicopter, rocket
flying saucer, hourglass=hourglass done, alarm clock, moon=full moon, crescent moon, sun, planet=ringed planet
star, cloud, storm=cloud with lightning and rain, tornado, rainbow
umbrella, snowflake, snowman, fire, dewdrop=droplet, wave=water wave
jack-o-lantern, Christmas tree, balloon, gift=wrapped gift, trophy, soccer ball, basketball
kite, game controller=video game, dice=game die, teddy bear
sunglasses, t-shirt, jeans, scarf, socks, dress, backpack, sneaker=running shoe
high heels=high-heeled shoe, crown, top hat, gem=gem stone, bell
headphones=headphone, saxophone, trumpet, guitar, piano=musical keyboard, violin, drum, telephone, laptop
television, camera, candle, light bulb, lantern=red paper lantern, books, scroll, money bag, envelope
scissors, key, hammer, axe, sword=dagger, shield, magnet
telescope, door, bed, moai, skull, ghost, alien, robot
astronaut, wizard=mage, mermaid, Santa Claus, ninja, princess, baby
smiling face=smiling face with smiling eyes, crying face=loudly crying face, angry face=enraged face
"""

# What else people call these things; each is a full name of its own, as good as the first.
_ALIASES: Final = {
    "castle": ("elven castle", "fairy tale castle", "fortress"),
    "dewdrop": ("droplet", "water drop", "dewdrop on a leaf"),
    "wave": ("great wave", "waterfall", "ocean wave", "sea"),
    "house": ("barn", "red barn", "home", "cottage"),
    "palm tree": ("jungle",),
    "tree": ("oak tree", "forest"),
    "leaf": ("green leaf", "leaves"),
    "red apple": ("apple",),
    "tulip": ("flower",),
    "robot": ("android",),
    "astronaut": ("spaceman",),
    "sunrise": ("dawn", "mountain at sunrise"),
    "city": ("skyline",),
    "ship": ("boat",),
    "cat": ("kitten", "cat head"),
    "dog": ("puppy", "dog head"),
    "dragon": ("green dragon",),
    "wizard": ("sorcerer",),
    "sword": ("knight's sword",),
    "hamburger": ("burger",),
    "airplane": ("plane",),
    "earth": ("planet earth", "globe"),
}

# Said around the thing and not drawn: the model learns to read past them.
_MEDIA: Final = (
    "a picture of", "a photo of", "a photograph of", "macro photograph of", "digital painting of",
    "concept art of", "concept art digital painting of", "an oil painting of", "oil painting of",
    "a drawing of", "a painting of", "a render of", "close-up of", "a watercolor of", "an illustration of",
)  # fmt: skip
_ADJECTIVES: Final = ("small", "big", "old", "cute", "beautiful", "lonely", "tiny", "majestic", "shiny")
_PLACES: Final = (
    "in a jungle", "at sunset", "on a white background", "on a table", "in the snow", "in space", "at night",
    "by the sea", "on a hill", "in a garden", "under a blue sky", "in the rain", "on a leaf", "at dawn",
    "in the forest", "on the moon", "on a wooden bench", "in a city",
)  # fmt: skip
_STYLES: Final = (
    "detailed", "8k", "4k", "highly detailed", "cold color palette", "muted colors", "warm colors", "sharp focus",
    "concept art", "digital painting", "oil painting", "trending on artstation", "soft light", "cinematic lighting",
    "inspired by lord of the rings", "3d render", "emoji", "isolated", "photorealistic", "watercolor", "white background",
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One thing: what it is called, the file that shows it, and what else is said about it."""

    name: str
    stem: str
    names: tuple[str, ...]
    tags: tuple[str, ...]


def assets(data: Path) -> Path:
    """The folder of the 3D pictures inside the data folder, however the package's folder is called."""
    return next(data.glob("*fluent-emoji-3d*/package/assets"))


def things(data: Path) -> list[Thing]:
    """Every thing of the world in a fixed order: its index is its identity during training."""
    source = next(data.glob("*emojibase-data*/package/en/data.json"))
    by_label = {entry["label"]: entry for entry in json.loads(source.read_text("utf-8"))}
    pictures = {path.stem for path in assets(data).glob("*.webp")}
    world = []
    for item in _NAMES.replace("\n", ",").split(","):
        if not item.strip():
            continue
        name, _, label = item.strip().partition("=")
        entry = by_label[label or name]
        code = str(entry["hexcode"]).lower()
        stem = next(stem for stem in (code, f"{code}-fe0f", code.replace("-fe0f", "")) if stem in pictures)
        world.append(Thing(name, stem, (name, *_ALIASES.get(name, ())), tuple(entry.get("tags", ()))))
    return world


def picture(data: Path, stem: str, size: int = SIZE) -> Image.Image:
    """One emoji on white.  Composited before it is shrunk, so that no dark fringe is left around it."""
    with Image.open(assets(data) / f"{stem}.webp") as file:
        emoji = file.convert("RGBA")
    page = Image.new("RGBA", emoji.size, "white")
    page.alpha_composite(emoji)
    return page.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def with_article(name: str) -> str:
    """`an apple`, `a castle`."""
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"


def caption(thing: Thing, rng: random.Random) -> str:
    """One of the many ways to ask for a thing; about one in four is no more than its name."""
    name = rng.choice(thing.names) if rng.random() < 0.4 else thing.name
    if rng.random() < 0.25:
        return with_article(name) if rng.random() < 0.5 else name
    if rng.random() < 0.15:
        name = f"{rng.choice(_ADJECTIVES)} {name}"
    text = with_article(name) if rng.random() < 0.6 else name
    if rng.random() < 0.45:
        text = f"{rng.choice(_MEDIA)} {text}"
    if rng.random() < 0.3:
        text = f"{text} {rng.choice(_PLACES)}"
    extras = []
    if thing.tags and rng.random() < 0.2:
        extras += rng.sample(thing.tags, min(2, len(thing.tags)))
    if rng.random() < 0.4:
        extras += rng.sample(_STYLES, rng.randint(1, 4))
    return ", ".join([text, *extras])
