"""Word lists for the text that `jobs/make_tiny.py` generates: names, places, things, and how they group."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in (pair.split(":") for pair in text.split())]


FIRST_NAMES = _words("""
Aaron Abigail Adam Adele Aisha Akira Alan Alba Alice Alma Amara Amelia Amir Ana Anders Andrea Angela Anika Anna Anton
Aria Arthur Asha Astrid Aurora Ava Beatriz Ben Benedict Bianca Bianka Bjorn Boris Brian Bruno Caleb Camila Carl Carla
Carmen Cecilia Chen Chiara Chloe Clara Cora Cyrus Dalia Dana Daniel Daria David Deepa Dennis Diana Diego Dimitri Dina
Dora Edith Edward Eileen Elena Eli Elias Elif Elise Emil Emma Erik Esther Ethan Eva Fabian Farah Fatima Felix Fiona
Flora Florian Francis Freya Gabriel Gemma George Georgia Gina Giulia Grace Greta Gustav Hana Hannah Harry Hassan Heidi
Helen Henry Hiro Hugo Ian Ibrahim Ida Ilse Imran Ines Ingrid Irene Iris Isaac Ivan Ivy Jack Jade James Jana Jasmine
Jenna Jia Joan Joel Johan Jonas Jorge Julia Julian June Kaito Karen Karim Kasper Katya Kenji Kira Klara Lara Lars Laura
Layla Lea Leo Leila Lena Liam Lila Linda Lisa Lola Lorenzo Louis Luca Lucas Lucy Luis Luna Lydia Magnus Malik Mara
Marco Maria Marie Mario Marta Martin Mateo Maya Mei Mila Milan Mina Mira Mohamed Mona Nadia Naomi Nathan Nia Nico Nina
Noah Noor Nora Olga Oliver Olivia Omar Oscar Otto Paula Pavel Pedro Peter Petra Philip Priya Quentin Rafael Raj Ravi
Rebecca Rhea Ricardo Robin Rosa Ruby Ruth Ryan Sabine Salma Sam Samira Sandra Sara Sebastian Selma Simon Sofia Stella
Stefan Suki Susan Sven Sylvia Tara Tessa Theo Thomas Tim Tina Tomas Uma Ursula Valentina Vera Victor Vincent Viola
Walter Wanda William Yara Yasmin Yuki Yusuf Zara Zoe
""")

LAST_NAMES = _words("""
Abbott Adams Ahmed Alvarez Andersen Baker Bauer Becker Bennett Berg Bianchi Blake Bose Brandt Brooks Campbell Carter
Castro Chan Clarke Cohen Costa Cruz Dahl Das Davies Dubois Duncan Eriksen Evans Farrell Fernandez Fischer Fletcher Fox
Garcia Gomez Graham Grant Greene Gupta Haas Hall Hansen Harper Hayes Hoffman Holm Hughes Ibarra Ito Jansen Jensen
Johnson Jones Kaplan Kaur Keller Kelly Khan Kim Klein Kowalski Kumar Lambert Larsen Lee Lewis Li Lopez Lund Marino
Martinez Mason Mehta Mendes Meyer Miller Moore Morales Moreau Morris Murphy Nakamura Nelson Nguyen Nielsen Novak Nowak
Olsen Ortega Owens Palmer Park Parker Patel Perez Petrov Price Quinn Rao Reed Reyes Ricci Rivera Roberts Rossi Roy
Russo Sanders Santos Sato Schmidt Sharma Silva Singh Smith Stein Suzuki Tanaka Taylor Thompson Torres Turner Vargas
Vogel Wagner Walker Wang Ward Weber West White Wilson Wood Wright Yamada Young Zhang Ziegler Zimmer
""")

CITIES = _words("""
Aberdeen Accra Adelaide Amsterdam Ankara Antwerp Athens Atlanta Austin Baltimore Bangkok Barcelona Basel Belfast Bergen
Berlin Bern Bilbao Bologna Bordeaux Boston Bremen Brisbane Bristol Brussels Bucharest Budapest Cairo Calgary Cardiff
Chicago Cologne Copenhagen Cork Dakar Dallas Delhi Denver Detroit Dresden Dublin Durban Edinburgh Florence Frankfurt
Geneva Genoa Ghent Glasgow Granada Hamburg Hanoi Helsinki Houston Istanbul Jakarta Kyoto Lagos Leeds Leipzig Lima
Lisbon Liverpool London Lyon Madrid Malaga Manchester Manila Marseille Melbourne Memphis Miami Milan Montreal Munich
Nairobi Nantes Naples Nice Oakland Osaka Oslo Ottawa Oxford Paris Perth Phoenix Porto Portland Prague Quebec Quito Riga
Rome Rotterdam Sacramento Salzburg Santiago Seattle Seoul Seville Sheffield Singapore Sofia Stockholm Sydney Tallinn
Tampa Tokyo Toronto Toulouse Trieste Tunis Turin Utrecht Valencia Vancouver Venice Verona Vienna Vilnius Warsaw York
Zagreb Zurich
""")

STREETS = _words("""
Acorn Ash Baker Beech Bridge Castle Cedar Chapel Cherry Church Elm Fern Forest Garden Grove Harbor Hazel High Hill
Holly Juniper Kings Lake Laurel Linden Lower Maple Market Meadow Mill North Oak Orchard Park Pine Poplar Queen River
Rose School Silver South Spring Station Sunset Temple Upper Valley Victoria Walnut Water Willow Windsor
""")

COLORS = _words(
    "amber beige black blue bronze brown cream crimson golden green grey indigo ivory lilac maroon navy olive "
    "orange pink purple red scarlet silver teal turquoise violet white yellow"
)

_GROUPS = {
    "tools": "hammer drill saw wrench chisel screwdriver spade rake ladder pliers sander clamp trowel axe level",
    "stationery": "notebook pencil stapler envelope folder ruler eraser marker calendar sketchbook binder stamp ribbon",
    "vegetables": "carrot potato onion cabbage spinach leek pumpkin radish celery turnip parsnip beetroot pepper",
    "fruit": "apple pear plum cherry grape melon peach mango fig lemon orange apricot kiwi papaya quince",
    "animals": "horse sheep goat rabbit fox otter badger owl eagle whale dolphin lion tiger zebra camel hedgehog",
    "clothes": "shirt jacket scarf glove sweater coat skirt sock belt hat raincoat sandal blouse vest cardigan",
    "furniture": "table chair sofa desk shelf wardrobe stool bench lamp cupboard mattress mirror bookcase drawer",
    "instruments": "piano violin flute trumpet drum guitar cello harp clarinet banjo oboe accordion tuba",
    "garden plants": "rose tulip daisy lavender fern ivy orchid lily sunflower basil mint thyme sage cactus",
    "vehicles": "car bus tram bicycle lorry van scooter train ferry tractor canoe motorbike taxi",
    "electronics": "charger keyboard headset camera printer monitor router tablet speaker battery cable adapter",
    "camping gear": "tent lantern rucksack compass stove rope blanket torch flask hammock whistle map",
}
GROUPS = {group: _words(things) for group, things in _GROUPS.items()}
THINGS = sorted({thing for things in GROUPS.values() for thing in things})

ADJECTIVES = _words("""
ancient big bright broken calm cheap clean clever cold cosy cracked damp dark deep dry dusty empty famous flat fresh
friendly gentle heavy hidden hollow huge kind large lazy light little lonely long loud lovely modern narrow neat new
noisy old pale plain polite proud quick quiet rare rough round rusty sharp shiny short shy silent simple slow small
smooth soft square steep sturdy sunny tall thick thin tiny tired warm wet wide wild wooden young
""")

OPPOSITES = _pairs("""
big:small hot:cold old:new early:late fast:slow happy:sad light:dark long:short loud:quiet open:closed rich:poor
strong:weak tall:short thick:thin wet:dry wide:narrow full:empty hard:soft high:low clean:dirty cheap:expensive
deep:shallow easy:difficult safe:dangerous sharp:blunt sweet:sour true:false young:old brave:cowardly left:right
above:below first:last inside:outside always:never remember:forget arrive:leave buy:sell push:pull win:lose
""")

PLURALS = {
    "box": "boxes", "child": "children", "city": "cities", "dish": "dishes", "foot": "feet", "glass": "glasses",
    "goose": "geese", "knife": "knives", "lady": "ladies", "leaf": "leaves", "man": "men", "mouse": "mice",
    "party": "parties", "shelf": "shelves", "story": "stories", "tooth": "teeth", "watch": "watches", "wolf": "wolves",
    "woman": "women", "bus": "buses", "berry": "berries", "brush": "brushes", "loaf": "loaves", "baby": "babies",
}  # fmt: skip

PAST = _pairs("""
go:went see:saw take:took give:gave come:came find:found make:made write:wrote read:read sing:sang run:ran buy:bought
bring:brought think:thought eat:ate drink:drank sleep:slept speak:spoke begin:began swim:swam fly:flew grow:grew
know:knew throw:threw choose:chose drive:drove ride:rode rise:rose fall:fell feel:felt keep:kept leave:left meet:met
walk:walked jump:jumped open:opened close:closed play:played help:helped carry:carried study:studied cook:cooked
paint:painted visit:visited travel:travelled watch:watched clean:cleaned plan:planned stop:stopped
""")

CAPITALS = _pairs("""
France:Paris Spain:Madrid Italy:Rome Germany:Berlin Portugal:Lisbon Greece:Athens Austria:Vienna Hungary:Budapest
Poland:Warsaw Sweden:Stockholm Norway:Oslo Denmark:Copenhagen Finland:Helsinki Ireland:Dublin Japan:Tokyo China:Beijing
India:Delhi Egypt:Cairo Kenya:Nairobi Peru:Lima Chile:Santiago Canada:Ottawa Croatia:Zagreb Estonia:Tallinn
Latvia:Riga Lithuania:Vilnius Romania:Bucharest Bulgaria:Sofia Belgium:Brussels Turkey:Ankara Thailand:Bangkok
Vietnam:Hanoi Ghana:Accra Senegal:Dakar Tunisia:Tunis Ecuador:Quito Indonesia:Jakarta
""")

PLACES_OF_USE = {
    "hammer": "to drive nails into wood", "umbrella": "to stay dry in the rain", "kettle": "to boil water",
    "ladder": "to reach high places", "compass": "to find the way north", "needle": "to sew cloth",
    "broom": "to sweep the floor", "pillow": "to rest your head in bed", "ruler": "to measure length",
    "scissors": "to cut paper and cloth", "lantern": "to give light in the dark", "wallet": "to carry money and cards",
    "clock": "to tell the time", "oven": "to bake bread and cakes", "towel": "to dry your hands",
    "shovel": "to dig in the ground", "calendar": "to keep track of dates", "key": "to open a lock",
    "camera": "to take pictures", "fridge": "to keep food cold", "glue": "to stick things together",
    "map": "to find the way", "soap": "to wash your hands", "thermometer": "to measure temperature",
}  # fmt: skip

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
NUMBER_WORDS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
SYLLABLES = _words("""
ba be bo bra ca ce cor da del dor dra el en fa fen fi gal gar gre ha hel ir is jo ka kel ko la lan lo lu ma mer mi mo
na nel no or pa pel po qui ra ren ri ro sa sel si sol sta ta tel ti tor tu ul va vel vi wen wi xa yo za zen
""")
