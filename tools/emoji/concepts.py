"""What the emoji world knows: its concepts, and those with a part of their own."""

from __future__ import annotations

from ipadapter_trainer.demo.emoji import TEXT_CONCEPTS

__all__ = ["CONCEPTS", "NEW_CONCEPTS", "PROMPT_IMAGES", "TEXT_CONCEPTS", "UNSEEN_CONCEPTS"]

# Chosen by hand among the icons that all five packages have: distinct in shape or colour, each drawn in every style.
# People, flags, clocks and signs are left out, and of look-alikes (a cat and a cat's face) one is kept.
_NAMES = """
    admission-tickets airplane alarm-clock alien alien-monster ambulance american-football anchor
    angry-face-with-horns ant artist-palette atom-symbol automobile avocado baby baby-angel baby-bottle
    baby-chick backpack bacon badminton baguette-bread balance-scale balloon banana bar-chart barber-pole
    baseball basketball bat bathtub battery beach-with-umbrella beer-mug bell bellhop-bell bicycle biohazard
    birthday-cake blowfish bomb books bottle-with-popping-cork bow-and-arrow bowling boxing-glove
    bridge-at-night briefcase broken-heart bug bullet-train bus butterfly cactus calendar camel camera camping
    candle canoe carousel-horse carp-streamer carrot castle cat-face chart-increasing cheese-wedge cherries
    chestnut chocolate-bar christmas-tree church circus-tent clapper-board classical-building closed-umbrella
    cloud cloud-with-lightning clown-face club-suit clutch-bag cocktail-glass collision confetti-ball
    construction-worker cookie cow-face cowboy-hat-face crab crayon credit-card crescent-moon crocodile
    croissant cross-mark crossed-swords crown crystal-ball cucumber cyclone dagger deciduous-tree delivery-truck
    desert desert-island diamond-suit dog-face dollar-banknote dolphin door double-exclamation-mark doughnut
    dragon-face dress droplet drum duck dvd eagle ear ear-of-corn egg eggplant electric-plug elephant envelope
    eye factory fallen-leaf ferris-wheel ferry film-projector fire fire-engine fireworks fish flag-in-hole
    flashlight fleur-de-lis flexed-biceps floppy-disk footprints fountain fountain-pen four-leaf-clover fox
    framed-picture french-fries fried-shrimp fuel-pump full-moon game-die gear gem-stone ghost glass-of-milk
    glasses globe-showing-europe-africa goal-net gorilla graduation-cap grapes green-heart grinning-face guard
    guitar hamburger hammer headphone heart-with-arrow helicopter high-heeled-shoe high-voltage honey-pot
    honeybee horse-face hospital hot-beverage hot-dog hot-pepper hot-springs hourglass-done house hundred-points
    ice-cream ice-skate jack-o-lantern japanese-castle jeans joystick key keyboard kick-scooter kimono kiss-mark
    kiwi-fruit koala lady-beetle large-blue-diamond lemon light-bulb lipstick lizard locked locomotive lollipop
    loudly-crying-face loudspeaker love-letter magnifying-glass-tilted-left mans-shoe mantelpiece-clock
    maple-leaf martial-arts-uniform megaphone melon metro microphone microscope milky-way minibus moai
    mobile-phone money-bag monkey-face mosque motor-boat motor-scooter motorcycle motorway mount-fuji
    mountain-cableway mouse-face mouth mushroom musical-keyboard musical-note nail-polish national-park
    nauseated-face nerd-face no-entry nose nut-and-bolt octopus office-building oil-drum open-book
    open-mailbox-with-raised-flag owl package paintbrush palm-tree pancakes paperclip party-popper
    passenger-ship peace-symbol peach peanuts pear pencil penguin performing-arts pig-face pile-of-poo pill
    pineapple ping-pong pizza police-car police-car-light police-officer pool-8-ball popcorn postal-horn postbox
    potato poultry-leg pushpin rabbit-face racing-car radio radioactive railway-track rainbow raised-fist
    raised-hand recycling-symbol red-apple red-circle red-heart red-paper-lantern rhinoceros ribbon rice-ball
    ring rocket roller-coaster rooster rose running-shirt running-shoe sailboat santa-claus satellite
    satellite-antenna saxophone school scissors scorpion scroll seat see-no-evil-monkey seedling shark shield
    shinto-shrine shopping-cart shortcake shower shrimp skis skull sleeping-face slot-machine
    smiling-face-with-halo smiling-face-with-heart-eyes smiling-face-with-sunglasses snail snake snowflake
    snowman soccer-ball spade-suit spaghetti sparkler speech-balloon speedboat spider spiral-calendar
    spiral-shell sport-utility-vehicle sports-medal squid stadium star stop-sign stopwatch straight-ruler
    strawberry sun sun-behind-cloud sunflower sunglasses sunrise-over-mountains sunset sushi sweat-droplets
    syringe t-shirt taco taxi teacup-without-handle telephone-receiver telescope television tennis tent
    thermometer thinking-face thumbs-up tiger-face toilet tokyo-tower tomato top-hat tornado tractor tram
    trident-emblem trolleybus trophy tropical-drink trumpet tulip turkey turtle umbrella vertical-traffic-light
    victory-hand video-game violin volcano volleyball warning wastebasket watch water-wave watermelon wedding
    wheelchair-symbol wind-chime winking-face-with-tongue wolf womans-boot womans-hat world-map wrapped-gift
    yin-yang
"""
CONCEPTS = tuple(_NAMES.split())

# Kept from every training, in every style: a harder question than a new drawing of something known.
_UNSEEN = """
    baggage-claim bed candy cityscape-at-dusk clapping-hands derelict-house detective dragon fishing-pole
    flushed-face folded-hands goblin last-quarter-moon night-with-stars ogre oncoming-fist paw-prints princess
    rescue-workers-helmet statue-of-liberty stop-button sun-behind-rain-cloud wine-glass womans-clothes
"""
UNSEEN_CONCEPTS = tuple(_UNSEEN.split())

# The model goes on from the weights of the first release, which saw the other concepts in the plain styles. So of the
# others only a comic or a pixel drawing can be new to it.
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
