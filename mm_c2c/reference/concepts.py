"""What can stand in a sticker scene: names, groups, and where each artwork keeps its picture."""

from typing import NamedTuple


class Concept(NamedTuple):
    """One thing a sticker can show.

    Attributes:
        name: what questions and answers call it.
        group: the kind of thing it is; one of `GROUPS`.
        code: Unicode code point in lower-case hex, the key of pixel and SVG sets.
        icon: its name in Iconify's sets.
        heldout: never shown in training; the concept split asks about these.
    """

    name: str
    group: str
    code: str
    icon: str
    heldout: bool = False


GROUPS = ("animal", "food", "vehicle", "clothing", "instrument", "plant", "tool")

_TABLE = """
animal: cat 1f431 cat-face; dog 1f436 dog-face; rabbit 1f430 rabbit-face; bear 1f43b bear
animal: panda 1f43c panda; tiger 1f42f tiger-face; cow 1f42e cow-face; pig 1f437 pig-face
animal: frog 1f438 frog; monkey 1f435 monkey-face; chicken 1f414 chicken; penguin 1f427 penguin
animal: elephant 1f418 elephant; snake 1f40d snake; turtle 1f422 turtle; fish 1f41f fish
animal: octopus 1f419 octopus; whale 1f433 spouting-whale; bee 1f41d honeybee; horse 1f434 horse-face
animal: *snail 1f40c snail; *mouse 1f42d mouse-face; *camel 1f42b two-hump-camel; *koala 1f428 koala
food: apple 1f34e red-apple; banana 1f34c banana; grapes 1f347 grapes; watermelon 1f349 watermelon
food: orange 1f34a tangerine; lemon 1f34b lemon; strawberry 1f353 strawberry; cherries 1f352 cherries
food: pineapple 1f34d pineapple; tomato 1f345 tomato; pizza 1f355 pizza; burger 1f354 hamburger
food: bread 1f35e bread; doughnut 1f369 doughnut; egg 1f373 cooking; corn 1f33d ear-of-corn
food: *pear 1f350 pear; *peach 1f351 peach; *cookie 1f36a cookie; *cake 1f370 shortcake
vehicle: car 1f697 automobile; bus 1f68c bus; bicycle 1f6b2 bicycle; airplane 2708 airplane
vehicle: rocket 1f680 rocket; train 1f682 locomotive; tractor 1f69c tractor; truck 1f69a delivery-truck
vehicle: helicopter 1f681 helicopter; sailboat 26f5 sailboat; ambulance 1f691 ambulance; ship 1f6a2 ship
vehicle: *taxi 1f695 taxi; *speedboat 1f6a4 speedboat
clothing: hat 1f3a9 top-hat; shirt 1f455 t-shirt; dress 1f457 dress; shoe 1f45f running-shoe
clothing: glasses 1f453 glasses; crown 1f451 crown; jeans 1f456 jeans; boot 1f462 womans-boot
clothing: *handbag 1f45c handbag; *necktie 1f454 necktie
instrument: guitar 1f3b8 guitar; piano 1f3b9 musical-keyboard; violin 1f3bb violin
instrument: trumpet 1f3ba trumpet; saxophone 1f3b7 saxophone
plant: tree 1f333 deciduous-tree; cactus 1f335 cactus; rose 1f339 rose; sunflower 1f33b sunflower
plant: tulip 1f337 tulip; mushroom 1f344 mushroom; palm 1f334 palm-tree; *clover 1f340 four-leaf-clover
tool: hammer 1f528 hammer; wrench 1f527 wrench; scissors 2702 scissors; key 1f511 key
tool: knife 1f52a kitchen-knife; pencil 270f pencil; *telescope 1f52d telescope
"""


def _parse(table: str) -> tuple[Concept, ...]:
    concepts = []
    for line in table.split("\n"):
        group, _, entries = line.partition(": ")
        for entry in entries.split("; ") if entries else ():
            name, code, icon = entry.split()
            concepts.append(Concept(name.lstrip("*"), group, code, icon, name.startswith("*")))
    return tuple(concepts)


CONCEPTS: tuple[Concept, ...] = _parse(_TABLE)
"""All concepts, in a fixed order; training shows 74 of the 88, see `Concept.heldout`."""

BY_NAME: dict[str, Concept] = {concept.name: concept for concept in CONCEPTS}
