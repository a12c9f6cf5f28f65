"""What the emoji world knows: its concepts, and those with a part of their own."""

from __future__ import annotations

# Chosen by hand among the icons that all five packages have: distinct in shape or colour, each drawn in every style.
# People, flags, clocks and signs are left out, and of look-alikes (a cat and a cat's face) one is kept.
_NAMES = """
    admission-tickets airplane ambulance american-football anchor ant artist-palette automobile avocado baby
    bacon badminton balloon banana barber-pole basketball bat beach-with-umbrella bell bicycle birthday-cake
    bomb bottle-with-popping-cork boxing-glove bug bus butterfly cactus calendar camera candle carousel-horse
    carrot castle cat-face chart-increasing cheese-wedge cherries chocolate-bar christmas-tree church cloud
    cloud-with-lightning clown-face club-suit cookie cow-face crab crescent-moon cross-mark crown crystal-ball
    desert-island dog-face dollar-banknote dolphin door double-exclamation-mark doughnut dress drum duck ear
    ear-of-corn egg elephant eye film-projector fire fireworks fish flashlight flexed-biceps floppy-disk
    four-leaf-clover fox french-fries full-moon game-die gear gem-stone ghost globe-showing-europe-africa grapes
    green-heart grinning-face guitar hamburger hammer high-heeled-shoe high-voltage honey-pot honeybee
    hot-beverage hourglass-done house ice-cream jack-o-lantern jeans joystick key kick-scooter kiss-mark koala
    lady-beetle large-blue-diamond lemon light-bulb lizard locomotive lollipop loudly-crying-face loudspeaker
    love-letter magnifying-glass-tilted-left maple-leaf megaphone melon milky-way minibus monkey-face mushroom
    musical-keyboard musical-note nose nut-and-bolt octopus owl party-popper passenger-ship peace-symbol peanuts
    pear penguin pig-face pill pineapple pizza police-car police-car-light police-officer pool-8-ball popcorn
    potato poultry-leg rabbit-face rainbow red-apple red-circle red-heart rhinoceros rice-ball rocket rose
    running-shirt sailboat see-no-evil-monkey shield shinto-shrine shopping-cart shrimp skull slot-machine
    smiling-face-with-halo smiling-face-with-heart-eyes smiling-face-with-sunglasses snail snake snowman
    soccer-ball spider sport-utility-vehicle star stopwatch strawberry sun sunflower sunset sushi television
    tennis tent thermometer thinking-face thumbs-up tiger-face tomato tornado tractor trophy tulip turkey turtle
    umbrella video-game violin volcano volleyball wastebasket watermelon winking-face-with-tongue womans-boot
    wrapped-gift yin-yang
"""
CONCEPTS = tuple(_NAMES.split())

# Asked for by text in the quality table: all styles of them are in the training split.
TEXT_CONCEPTS = (
    "airplane",
    "banana",
    "bicycle",
    "birthday-cake",
    "bus",
    "cat-face",
    "christmas-tree",
    "fish",
    "guitar",
    "house",
    "key",
    "mushroom",
    "red-heart",
    "rocket",
    "star",
    "umbrella",
)

# Kept from every training, in every style: a harder question than a new drawing of something known.
_UNSEEN = """
    baggage-claim bed candy cityscape-at-dusk clapping-hands derelict-house detective dragon fishing-pole
    flushed-face folded-hands goblin last-quarter-moon night-with-stars ogre oncoming-fist paw-prints princess
    rescue-workers-helmet statue-of-liberty stop-button sun-behind-rain-cloud wine-glass womans-clothes
"""
UNSEEN_CONCEPTS = tuple(_UNSEEN.split())

# The weights are a continuation of those of the first release, which saw the other concepts in the plain styles. Of
# those, only a comic or a pixel drawing can be new to the model.
_NEW = """
    american-football automobile bacon bell bottle-with-popping-cork boxing-glove candle carrot cheese-wedge
    crab cross-mark desert-island door drum floppy-disk french-fries game-die hammer kick-scooter kiss-mark
    lady-beetle large-blue-diamond lizard megaphone pineapple pizza pool-8-ball poultry-leg running-shirt
    soccer-ball stopwatch thumbs-up
"""
NEW_CONCEPTS = tuple(_NEW.split())

# (concept, style) of the held-out images that the nodes and the demo offer: no model has seen them.
PROMPT_IMAGES = (
    ("crab", "twemoji"),
    ("french-fries", "noto"),
    ("honeybee", "comic"),
    ("lady-beetle", "twemoji"),
    ("pineapple", "fluent"),
    ("rainbow", "comic"),
    ("tiger-face", "pixel"),
    ("watermelon", "pixel"),
)
