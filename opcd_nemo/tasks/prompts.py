"""The words that the style tasks ask about."""

from __future__ import annotations

TEMPLATES = {
    "what": "What is {}?",
    "about": "Tell me about {}.",
    "why": "Why is {} useful?",
    "how": "Explain how {} works.",
}

# No demonstration of conf/context has any of these words.
_NOUN_TEXT = """
    accordion airport anchor aquarium axe backpack balloon banjo barn barometer basket bathtub
    battery beaver bell bicycle binder blanket blender boat bookcase bottle bracelet bridge
    broom brush bucket bulldozer bus button cable cactus calculator calendar camel camera candle
    canoe cart castle cello chair chimney cinema clarinet clock coin compass computer cow crane
    crayon curtain cushion dam desk dictionary dolphin donkey door drill drum eagle elevator
    engine envelope eraser escalator faucet fence ferry fireplace flashlight flute fork fountain
    freezer fridge funnel garage garden gate generator glacier glove greenhouse guitar hammer
    hammock harbor harp helicopter helmet hinge hospital hotel jacket kettle keyboard ladder
    lake lamp laundromat lawnmower library lighthouse lock magnet map market microphone
    microscope mirror museum needle newspaper notebook oven paintbrush parachute park pencil
    pharmacy piano pillow plow printer pulley pump quilt radiator radio river robot rope ruler
    sail sandal satellite saw scarf school screwdriver shovel sled spoon stapler stethoscope
    stove submarine suitcase sundial swing syringe telescope tent thermometer thermostat toaster
    tractor train trumpet tunnel turbine umbrella valve volcano wagon wallet watch wheel
    wheelbarrow whistle windmill wrench zipper
"""
NOUNS = tuple(_NOUN_TEXT.split())

# No country's name holds its capital's, so an echo of the question is no answer.
CAPITALS = {
    "Afghanistan": "Kabul",
    "Albania": "Tirana",
    "Algeria": "Algiers",
    "Angola": "Luanda",
    "Argentina": "Buenos Aires",
    "Armenia": "Yerevan",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Azerbaijan": "Baku",
    "Bahrain": "Manama",
    "Bangladesh": "Dhaka",
    "Belgium": "Brussels",
    "Brazil": "Brasília",
    "Bulgaria": "Sofia",
    "Cambodia": "Phnom Penh",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogotá",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Ecuador": "Quito",
    "Egypt": "Cairo",
    "Estonia": "Tallinn",
    "Ethiopia": "Addis Ababa",
    "Finland": "Helsinki",
    "France": "Paris",
    "Georgia": "Tbilisi",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "India": "New Delhi",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Jamaica": "Kingston",
    "Japan": "Tokyo",
    "Jordan": "Amman",
    "Kenya": "Nairobi",
    "Latvia": "Riga",
    "Lebanon": "Beirut",
    "Malaysia": "Kuala Lumpur",
    "Mongolia": "Ulaanbaatar",
    "Morocco": "Rabat",
    "Nepal": "Kathmandu",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Syria": "Damascus",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Uruguay": "Montevideo",
    "Venezuela": "Caracas",
    "Vietnam": "Hanoi",
}

# Questions for a general assistant, without capitals and without `NOUNS`.
_ANCHOR_FRAMES = {
    "What is the opposite of the word '{}'?": (
        "hot | early | full | brave | noisy | cheap | ancient | wide | gentle | bright | heavy | "
        "simple"
    ),
    "Translate the word '{}' into French.": (
        "cat | water | friend | red | winter | house | apple | night | bread | mother | horse | "
        "green"
    ),
    "How many {}?": (
        "days are in a week | minutes are in an hour | months are in a year | sides does a "
        "triangle have | legs does a spider have | planets orbit the sun | letters are in the "
        "English alphabet | grams are in a kilogram | players are on a soccer team | hours are in "
        "a day | years are in a century | centimeters are in a meter"
    ),
    "Who {}?": (
        "wrote Romeo and Juliet | painted the Mona Lisa | discovered penicillin | developed the "
        "theory of relativity | wrote Pride and Prejudice | composed the Fifth Symphony in C "
        "minor | was the first person on the moon | discovered gravity | wrote The Odyssey | "
        "invented the printing press | was the first president of the United States | wrote War "
        "and Peace"
    ),
    "What is {}?": (
        "7 plus 5 | 12 minus 4 | 6 times 3 | 20 divided by 4 | half of 30 | 9 plus 9 | the square "
        "root of 49 | 100 minus 25 | 8 times 8 | 15 plus 16 | 11 times 2 | 36 divided by 6"
    ),
    "Name three {}.": (
        "fruits | colors | vegetables | oceans | board games | insects | planets | sports | "
        "spices | metals | birds | kinds of weather"
    ),
    "Write a short {}.": (
        "birthday wish for a colleague | poem about rain | thank-you note to a teacher | story "
        "about a lost dog | apology for being late | joke about the weather | invitation to "
        "dinner | motto for a running club | review of a tasty soup | lullaby | toast for a "
        "wedding | prayer for peace"
    ),
    "Give me a tip for {}.": (
        "sleeping better | saving money | learning a language | staying calm before an exam | "
        "cooking rice | making new friends | keeping houseplants alive | writing a good essay | "
        "waking up early | remembering names | eating less sugar | speaking in public"
    ),
}
ANCHORS = tuple(
    frame.format(filling)
    for frame, fillings in _ANCHOR_FRAMES.items()
    for filling in fillings.split(" | ")
)
