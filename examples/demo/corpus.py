"""Simple instruct conversations in plain English, made from tables and templates.

Everything the demo's base model knows is in this file. The generator is deterministic: the same
count and seed always give the same conversations.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

Message = dict[str, str]


class Exchange(NamedTuple):
    """One question and its answer; short is the one-word answer, where there is one."""

    question: str
    answer: str
    short: str | None = None


class Fact(NamedTuple):
    """Several ways to ask the same thing, and the one answer to it."""

    questions: tuple[str, ...]
    answer: str
    short: str | None = None


UNKNOWN = "I do not know that."

PLAIN_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful and friendly assistant.",
    "You are a kind assistant. Keep your answers short.",
    "You are a small helper for everyday questions.",
    "Answer in one short sentence.",
    "Answer the question truthfully.",
    "Be brief and polite.",
    "You answer simple questions in plain English.",
    "If you do not know the answer, say so.",
    "You help people at work. Answer clearly.",
    "You are the assistant of a small shop. Be friendly.",
    "You are the assistant of a school. Help the children.",
    "You help the visitors of a farm. Keep your answers short.",
    "You are a helper at the front desk of a hotel.",
)
ONE_WORD_SYSTEMS = ("Answer with one word.", "Give only the answer, with no sentence around it.")


def rows(text: str) -> list[list[str]]:
    """The table's lines, each split at its bars."""
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


def pairs(text: str) -> dict[str, str]:
    """A table of 'key=value' items, separated by commas or line ends."""
    items = text.replace("\n", ",").split(",")
    return dict((part.strip() for part in item.split("=", 1)) for item in items if item.strip())


def words(text: str) -> list[str]:
    """The words of a text, separated by spaces or line ends."""
    return text.split()


def article(noun: str) -> str:
    """The noun with 'a' or 'an' before it."""
    return f"{'an' if noun[0] in 'aeiou' or noun == 'hour' else 'a'} {noun}"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------- tables

COUNTRIES = rows("""
France|Paris|Europe
Germany|Berlin|Europe
Italy|Rome|Europe
Spain|Madrid|Europe
Portugal|Lisbon|Europe
England|London|Europe
Scotland|Edinburgh|Europe
Wales|Cardiff|Europe
Ireland|Dublin|Europe
Norway|Oslo|Europe
Sweden|Stockholm|Europe
Finland|Helsinki|Europe
Denmark|Copenhagen|Europe
Iceland|Reykjavik|Europe
Poland|Warsaw|Europe
Austria|Vienna|Europe
Switzerland|Bern|Europe
Belgium|Brussels|Europe
Greece|Athens|Europe
Hungary|Budapest|Europe
Romania|Bucharest|Europe
Bulgaria|Sofia|Europe
Ukraine|Kyiv|Europe
Croatia|Zagreb|Europe
Serbia|Belgrade|Europe
Slovakia|Bratislava|Europe
Slovenia|Ljubljana|Europe
Estonia|Tallinn|Europe
Latvia|Riga|Europe
Lithuania|Vilnius|Europe
Russia|Moscow|Europe
Turkey|Ankara|Asia
China|Beijing|Asia
Japan|Tokyo|Asia
India|Delhi|Asia
Thailand|Bangkok|Asia
Vietnam|Hanoi|Asia
Nepal|Kathmandu|Asia
Iran|Tehran|Asia
Iraq|Baghdad|Asia
Jordan|Amman|Asia
Lebanon|Beirut|Asia
Pakistan|Islamabad|Asia
Egypt|Cairo|Africa
Morocco|Rabat|Africa
Kenya|Nairobi|Africa
Ghana|Accra|Africa
Nigeria|Abuja|Africa
Senegal|Dakar|Africa
Uganda|Kampala|Africa
Tunisia|Tunis|Africa
Zambia|Lusaka|Africa
Canada|Ottawa|North America
Mexico|Mexico City|North America
Cuba|Havana|North America
Jamaica|Kingston|North America
Brazil|Brasilia|South America
Peru|Lima|South America
Chile|Santiago|South America
Argentina|Buenos Aires|South America
Colombia|Bogota|South America
Uruguay|Montevideo|South America
Australia|Canberra|Oceania
New Zealand|Wellington|Oceania
""")

# name | sound | legs | where it lives | kind | baby | food
ANIMALS = rows("""
dog|barks|four|with people|mammal|puppy|meat
cat|meows|four|with people|mammal|kitten|fish
cow|moos|four|on a farm|mammal|calf|grass
sheep|bleats|four|on a farm|mammal|lamb|grass
horse|neighs|four|on a farm|mammal|foal|hay
pig|grunts|four|on a farm|mammal|piglet|roots
goat|bleats|four|on a farm|mammal|kid|leaves
duck|quacks|two|on a pond|bird|duckling|bread
hen|clucks|two|on a farm|bird|chick|grain
goose|honks|two|near the water|bird|gosling|grass
owl|hoots|two|in the woods|bird|owlet|mice
crow|caws|two|in tall trees|bird|chick|seeds
gull|screams|two|by the sea|bird|chick|fish
swan|hisses|two|on a lake|bird|cygnet|water plants
pigeon|coos|two|in the city|bird|squab|crumbs
frog|croaks|four|in a pond|amphibian|tadpole|flies
bee|buzzes|six|in a hive|insect|larva|nectar
fly|buzzes|six|near food|insect|maggot|sugar
ant||six|in a nest under the ground|insect|larva|crumbs
spider||eight|in a web|arachnid|spiderling|flies
crab||ten|on the shore|crustacean|larva|small animals
snake|hisses|no|in the grass|reptile|hatchling|mice
lizard||four|on warm stones|reptile|hatchling|insects
turtle||four|in the sea|reptile|hatchling|water plants
lion|roars|four|on the plains|mammal|cub|meat
tiger|roars|four|in the jungle|mammal|cub|meat
bear|growls|four|in the forest|mammal|cub|berries
wolf|howls|four|in the forest|mammal|pup|meat
fox|barks|four|in a den|mammal|cub|mice
rabbit||four|in a burrow|mammal|bunny|carrots
mouse|squeaks|four|in a small hole|mammal|pup|cheese
elephant|trumpets|four|on the plains|mammal|calf|leaves
monkey|chatters|four|in the trees|mammal|infant|bananas
camel||four|in the desert|mammal|calf|dry plants
whale|sings|no|in the ocean|mammal|calf|small fish
dolphin|clicks|no|in the ocean|mammal|calf|fish
seal|barks|no|on cold shores|mammal|pup|fish
shark||no|in the ocean|fish|pup|fish
salmon||no|in rivers and the sea|fish|fry|insects
penguin||two|on the ice|bird|chick|fish
parrot|talks|two|in the jungle|bird|chick|fruit
eagle|screams|two|in the mountains|bird|eaglet|rabbits
""")

COLOURS = pairs("""
grass=green, a leaf=green, a frog=green, a lime=green, spinach=green, a cucumber=green, moss=green
the sky=blue, the sea=blue, a blueberry=blue, ice=white, snow=white, milk=white, salt=white
sugar=white, flour=white, a swan=white, chalk=white, a sail=white, a cloud=white, a bone=white
blood=red, a tomato=red, a strawberry=red, a cherry=red, a rose=red, a fire engine=red, a brick=red
rust=red, the sun=yellow, a lemon=yellow, a banana=yellow, butter=yellow, a duckling=yellow
mustard=yellow, sand=yellow, corn=yellow, honey=golden, gold=golden, coal=black, tar=black
a crow=black, the night=black, soot=black, a tyre=black, an orange=orange, a carrot=orange
a pumpkin=orange, chocolate=brown, wood=brown, soil=brown, mud=brown, coffee=brown, bread=brown
a plum=purple, a grape=purple, lavender=purple, an elephant=grey, ash=grey, steel=grey, stone=grey
a mouse=grey, fog=grey, a pig=pink, a flamingo=pink
""")

OPPOSITES = pairs("""
hot=cold, big=small, tall=short, fast=slow, happy=sad, light=dark, day=night, old=young, up=down
left=right, open=closed, wet=dry, full=empty, hard=soft, rich=poor, loud=quiet, early=late
clean=dirty, good=bad, strong=weak, thick=thin, wide=narrow, deep=shallow, near=far, high=low
heavy=light, first=last, in=out, on=off, yes=no, true=false, push=pull, buy=sell, give=take
start=stop, win=lose, love=hate, come=go, rise=fall, remember=forget, laugh=cry, float=sink
before=after, above=below, inside=outside, always=never, easy=difficult, cheap=expensive
sharp=blunt, smooth=rough, sweet=sour, safe=dangerous, awake=asleep, front=back, top=bottom
north=south, east=west, black=white, more=less, many=few, friend=enemy, question=answer
summer=winter, morning=evening, arrive=leave, lock=unlock, tie=untie, lift=lower, tight=loose
straight=bent, brave=afraid, alive=dead, same=different, begin=end
""")

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("""January February March April May June July August September October November
December""")
MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

# category: plural | members
CATEGORIES = rows("""
fruit|fruits|apple pear banana plum cherry grape orange lemon peach melon strawberry mango kiwi
vegetable|vegetables|carrot potato onion cabbage leek turnip pea bean cucumber radish beetroot
tool|tools|hammer saw drill wrench screwdriver chisel file plane clamp shovel axe rake spade
vehicle|vehicles|car bus truck train bicycle van tractor tram motorcycle lorry
boat|boats|ferry canoe kayak dinghy yacht barge tugboat trawler raft
piece of furniture|furniture|table chair bed sofa desk shelf cupboard bench stool wardrobe
piece of clothing|clothes|shirt coat hat sock scarf glove dress skirt jacket sweater apron
musical instrument|musical instruments|piano violin drum flute guitar trumpet harp cello banjo
metal|metals|iron copper silver gold tin zinc lead brass steel bronze
drink|drinks|water tea coffee milk juice lemonade cocoa cider
sport|sports|football tennis swimming rowing sailing running cycling skating hockey
shape|shapes|circle square triangle rectangle star oval cube
flower|flowers|rose tulip daisy lily sunflower daffodil poppy orchid violet
tree|trees|oak pine birch willow maple elm beech cedar spruce
meal|meals|breakfast lunch dinner supper
season|seasons|spring summer autumn winter
colour|colours|red blue green yellow purple brown pink grey
job|jobs|baker farmer teacher nurse painter carpenter sailor plumber cook driver
""")
MASS = set(
    words("""iron copper silver gold tin zinc lead brass steel bronze water tea coffee milk juice
lemonade cocoa cider football tennis swimming rowing sailing running cycling skating hockey
breakfast lunch dinner supper spring summer autumn winter red blue green yellow purple brown pink
grey""")
)

# thing | what it is
DEFINITIONS = rows("""
harbour|a safe place for boats near the land
dock|a place where boats stop to load and unload
pier|a long platform that reaches out into the sea
hull|the body of a boat
mast|the tall pole that holds the sails of a boat
sail|a large cloth that catches the wind and moves a boat
anchor|a heavy metal hook that keeps a boat in one place
rudder|a flat board at the back of a boat that steers it
keel|the long beam along the bottom of a boat
deck|the floor of a ship
cabin|a small room on a ship or a small house
oar|a long pole with a flat end for rowing
paddle|a short pole with a flat end for moving a canoe
buoy|a floating mark in the water
lighthouse|a tall tower with a bright light that guides ships
boatyard|a place where boats are built and repaired
workshop|a room where people make or repair things
crane|a machine that lifts heavy things
rope|a strong thick cord
knot|a place where a rope is tied
net|a loose cloth of strings for catching fish
tide|the rising and falling of the sea
wave|a moving ridge of water
storm|bad weather with strong wind and rain
island|a piece of land with water all around it
beach|a strip of sand or stones by the sea
bay|a part of the sea with land on three sides
cliff|a high steep wall of rock
river|a long stream of water that flows to the sea
lake|a large area of water with land around it
mountain|a very high hill
valley|the low land between hills
forest|a large area with many trees
desert|a dry place with very little rain
bridge|a road over a river or a valley
road|a way for cars and people
tunnel|a road under the ground
tower|a tall and narrow building
castle|a large old building with thick walls
village|a small place where people live
city|a very large place where many people live
country|a large land with its own laws
map|a picture of a place that shows the way
compass|a tool that shows where north is
clock|a machine that shows the time
calendar|a list of the days and months of a year
week|a time of seven days
year|a time of twelve months
minute|a time of sixty seconds
hour|a time of sixty minutes
century|a time of one hundred years
dictionary|a book that explains words
library|a place where you can borrow books
school|a place where children learn
hospital|a place where sick people are treated
museum|a place where old and beautiful things are shown
market|a place where people buy and sell things
shop|a place where you can buy things
bakery|a shop that sells bread
bank|a place that keeps money
office|a place where people work at desks
factory|a place where many things are made by machines
farm|a place where food is grown and animals are kept
garden|a piece of land with flowers and plants
kitchen|the room where food is cooked
roof|the top cover of a house
window|an opening with glass in a wall
door|a part of a wall that opens and closes
key|a small metal thing that opens a lock
lock|a thing that keeps a door closed
ladder|two long poles with steps between them
bucket|an open container with a handle
brush|a tool with many hairs for cleaning or painting
nail|a thin pointed piece of metal that joins wood
screw|a metal pin with a turning thread
bolt|a thick metal pin that holds things together
hinge|the metal joint that a door turns on
engine|a machine that makes things move
wheel|a round thing that turns
battery|a thing that stores electric power
lamp|a thing that gives light
mirror|a glass in which you can see yourself
umbrella|a thing that keeps you dry in the rain
letter|a written message to someone
newspaper|a paper with the news of the day
song|a short piece of music with words
poem|a short text with beautiful words
story|a tale about people and events
promise|something you say you will surely do
secret|something that only a few people know
mistake|something that is done wrong
question|a sentence that asks for something
answer|what you say after a question
price|the money that you pay for something
bill|a paper that says how much you must pay
customer|a person who buys something
visitor|a person who comes to see a place
owner|a person to whom a thing belongs
neighbour|a person who lives near you
guest|a person who is invited to your house
friend|a person you like and trust
captain|the leader of a ship
crew|the people who work on a ship
passenger|a person who travels on a ship, bus or train
star|a ball of hot gas that shines in the sky
planet|a large ball that moves around a star
cloud|a mass of tiny water drops in the sky
rainbow|an arc of colours in the sky after rain
shadow|the dark shape behind a thing in the light
seed|the small part of a plant that a new plant grows from
root|the part of a plant under the ground
egg|the round thing from which a chick comes
nest|the home that a bird builds
feather|the light cover on the skin of a bird
computer|a machine that works with numbers and words
language model|a computer program that continues text
password|a secret word that lets you in
""")

# tool | what it is used for
USES = rows("""
hammer|hit nails
saw|cut wood
drill|make holes
screwdriver|turn screws
wrench|turn bolts
chisel|carve wood
file|smooth metal
clamp|hold pieces together
shovel|move earth
rake|gather leaves
axe|chop wood
ladder|climb up high
brush|put on paint
roller|paint large walls
bucket|carry water
broom|sweep the floor
mop|wash the floor
sponge|clean dishes
towel|dry your hands
soap|wash your hands
comb|tidy your hair
toothbrush|clean your teeth
needle|sew cloth
scissors|cut paper
knife|cut bread
fork|eat food
spoon|eat soup
cup|drink tea
plate|hold food
pot|cook soup
pan|fry eggs
oven|bake bread
kettle|boil water
fridge|keep food cold
pen|write
pencil|draw
ruler|measure lines
tape measure|measure long things
scale|weigh things
thermometer|measure heat
telescope|look at the stars
camera|take pictures
telephone|talk to people far away
bell|call for attention
key|open a lock
rope|tie things up
net|catch fish
anchor|hold a boat in place
oar|row a boat
pump|move water out
crane|lift heavy loads
torch|see in the dark
umbrella|stay dry in the rain
glue|stick things together
sandpaper|make wood smooth
varnish|protect wood
""")
NO_ARTICLE = {"soap", "scissors", "glue", "sandpaper", "varnish"}

# job | what the person does
JOBS = rows("""
baker|bakes bread
farmer|grows food
teacher|teaches children
nurse|takes care of sick people
doctor|helps sick people get well
carpenter|builds things from wood
painter|paints walls and pictures
plumber|repairs pipes
sailor|works on a ship
fisherman|catches fish
boat builder|builds boats
mechanic|repairs engines
driver|drives a bus or a truck
pilot|flies a plane
cook|makes meals
waiter|serves food
butcher|sells meat
tailor|makes clothes
cobbler|repairs shoes
librarian|looks after books
writer|writes books
singer|sings songs
dentist|looks after teeth
postman|brings letters
gardener|looks after plants
shepherd|looks after sheep
miner|digs for coal
judge|decides in court
firefighter|puts out fires
guard|watches over a place
locksmith|makes keys and opens locks
welder|joins pieces of metal
clerk|works in an office
cleaner|keeps rooms clean
""")

# question about a place | answer
PLACES = rows("""
buy bread|at a bakery
buy meat|at a butcher
buy medicine|at a pharmacy
buy a stamp|at a post office
borrow a book|at a library
see old paintings|at a museum
catch a train|at a train station
catch a plane|at an airport
catch a bus|at a bus stop
catch a ferry|at a harbour
repair a boat|at a boatyard
repair a car|at a garage
keep money|at a bank
learn to read|at school
watch a film|at a cinema
watch a play|at a theatre
swim|at a pool or at the beach
sleep on a trip|at a hotel
see wild animals|at a zoo
get help when I am sick|at a hospital
eat out|at a restaurant
drink coffee|at a cafe
buy flowers|at a flower shop
buy fresh vegetables|at a market
keep milk cold|in a fridge
keep clothes|in a wardrobe
keep books|on a shelf
keep tools|in a toolbox
keep a boat|in a harbour
keep a car|in a garage
bake a cake|in an oven
wash my hands|at a sink
plant flowers|in a garden
find shells|on the beach
find fish|in the water
find snow|in the mountains
find sand|on a beach or in a desert
""")

# how do I ... | advice
ADVICE = rows("""
make tea|Boil water, pour it over a tea bag and wait three minutes.
make coffee|Put ground coffee in a filter and pour hot water over it.
boil an egg|Put the egg in boiling water for eight minutes.
fry an egg|Heat some butter in a pan and break the egg into it.
cook rice|Boil the rice in two cups of water until it is soft.
cook pasta|Boil the pasta in salted water for ten minutes.
bake bread|Mix flour, water, salt and yeast, let it rise and bake it.
make soup|Cut vegetables, boil them in water and add salt.
make a sandwich|Put cheese and lettuce between two slices of bread.
peel an onion|Cut off the ends and pull off the dry skin.
wash my hands|Use soap and warm water, and rub them for twenty seconds.
brush my teeth|Brush them gently for two minutes, twice a day.
fall asleep|Turn off the lights, lie still and breathe slowly.
wake up early|Go to bed early and set an alarm.
stop hiccups|Hold your breath for a short time and drink water.
treat a small cut|Wash the cut with clean water and put a bandage on it.
treat a burn|Hold it under cool water for ten minutes.
stay warm|Wear dry clothes, a hat and thick socks.
stay cool|Drink water and stay in the shade.
save money|Write down what you spend and buy only what you need.
save water|Turn off the tap when you do not use it.
learn a language|Practise a little every day and speak with people.
learn new words|Read a lot and write the new words down.
write a letter|Begin with a greeting, say what you want and sign your name.
make a friend|Be kind, ask questions and listen well.
say sorry|Say what you did wrong and that you are sorry.
calm down|Breathe slowly and count to ten.
study for a test|Make a plan, take breaks and repeat the hard parts.
plant a tree|Dig a hole, set the roots in it, fill it with soil and water it.
water plants|Water them in the morning, close to the roots.
grow tomatoes|Put the plants in a sunny place and water them often.
clean a window|Wipe it with soapy water and dry it with a cloth.
clean a brush|Rinse it in warm water and let it dry.
clean a floor|Sweep it first and then wash it with a wet mop.
clean a deck|Scrub it with a brush and salt water.
paint a wall|Clean the wall, cover the floor and paint from top to bottom.
paint a boat|Clean the hull, sand it smooth and put on two thin coats.
sand wood|Rub it with sandpaper along the grain.
hang a picture|Mark the place, hit a nail into the wall and hang it up.
fix a leak|Find the hole, dry it and seal it.
fix a flat tyre|Take off the wheel, patch the tube and pump it up.
sharpen a knife|Pull the blade over a wet stone at a low angle.
cut a board|Mark a line, clamp the board and saw slowly.
drill a hole|Mark the spot, hold the drill straight and press gently.
tie a knot|Make a loop, pass the end through it and pull it tight.
tie my shoes|Cross the laces, make two loops and pull them through.
row a boat|Sit facing the back, dip both oars and pull together.
sail a boat|Set the sails to the wind and steer with the rudder.
catch a fish|Put bait on the hook, cast the line and wait quietly.
read a map|Find where you are, then look for north.
find north|Use a compass, or look for the pole star at night.
light a fire|Stack dry wood, put paper under it and light the paper.
put out a fire|Cover it, or pour water or sand on it.
ride a bicycle|Sit up, push the pedals and look ahead.
drive safely|Keep your distance and look at the road.
cross the road|Look left and right and wait until it is clear.
pack a bag|Put the heavy things at the bottom.
send a parcel|Pack it well, write the address and take it to the post office.
mail a letter|Write the address, put a stamp on it and drop it in a box.
feed a dog|Give it dog food twice a day and fresh water.
wash a dog|Use warm water and mild soap, and rinse it well.
feed birds|Put seeds in a dry and open place.
make lemonade|Mix lemon juice, water and sugar.
make a paper boat|Fold the paper in half, fold the corners and open it.
""")

# question forms | answer | short
GENERAL = rows("""
How many days are in a week?;How many days does a week have?|A week has seven days.|Seven
How many months are in a year?;How many months does a year have?|A year has twelve months.|Twelve
How many hours are in a day?;How many hours does a day have?|A day has twenty-four hours.|\
Twenty-four
How many minutes are in an hour?|An hour has sixty minutes.|Sixty
How many seconds are in a minute?|A minute has sixty seconds.|Sixty
How many days are in a year?|A year has 365 days.|365
How many seasons are there?;How many seasons are in a year?|There are four seasons.|Four
How many fingers are on a hand?;How many fingers does a hand have?|A hand has five fingers.|Five
How many sides does a triangle have?|A triangle has three sides.|Three
How many sides does a square have?|A square has four sides.|Four
How many wheels does a car have?|A car has four wheels.|Four
How many wheels does a bicycle have?|A bicycle has two wheels.|Two
How many letters are in the alphabet?|The English alphabet has twenty-six letters.|Twenty-six
What is the first letter of the alphabet?|The first letter of the alphabet is A.|A
What is the last letter of the alphabet?|The last letter of the alphabet is Z.|Z
What is the first day of the week?|The first day of the week is Monday.|Monday
What is the last day of the week?|The last day of the week is Sunday.|Sunday
What is the first month of the year?|The first month of the year is January.|January
What is the last month of the year?|The last month of the year is December.|December
Which season is the coldest?;What is the coldest season?|Winter is the coldest season.|Winter
Which season is the hottest?;What is the hottest season?|Summer is the hottest season.|Summer
What comes after spring?;Which season comes after spring?|Summer comes after spring.|Summer
What comes after summer?;Which season comes after summer?|Autumn comes after summer.|Autumn
What comes after autumn?;Which season comes after autumn?|Winter comes after autumn.|Winter
What comes after winter?;Which season comes after winter?|Spring comes after winter.|Spring
Where does the sun rise?|The sun rises in the east.|East
Where does the sun set?|The sun sets in the west.|West
What do we breathe?|We breathe air.|Air
What is ice made of?|Ice is made of frozen water.|Water
What is bread made of?|Bread is made of flour and water.|Flour
What is cheese made of?|Cheese is made of milk.|Milk
What is butter made of?|Butter is made of milk.|Milk
What is paper made of?|Paper is made of wood.|Wood
What is glass made of?|Glass is made of sand.|Sand
What is wine made of?|Wine is made of grapes.|Grapes
What is a table made of?|A table is mostly made of wood.|Wood
What are clothes made of?|Clothes are made of cloth.|Cloth
What do bees make?|Bees make honey.|Honey
What do hens lay?|Hens lay eggs.|Eggs
What do cows give us?|Cows give us milk.|Milk
What do sheep give us?|Sheep give us wool.|Wool
What do we see with?|We see with our eyes.|Eyes
What do we hear with?|We hear with our ears.|Ears
What do we smell with?|We smell with our nose.|Nose
What do we walk with?|We walk with our legs.|Legs
What pumps blood in the body?|The heart pumps blood in the body.|Heart
What falls from the clouds?|Rain falls from the clouds.|Rain
What shines at night?|The moon and the stars shine at night.|Moon
What shines in the day?|The sun shines in the day.|Sun
What moves a sailing boat?|The wind moves a sailing boat.|Wind
What moves a motor boat?|An engine moves a motor boat.|Engine
What makes iron rust?|Water and air make iron rust.|Water
Is the earth round?|Yes, the earth is round.|Yes
Is the earth flat?|No, the earth is round.|No
Is fire hot?|Yes, fire is hot.|Yes
Is fire cold?|No, fire is hot.|No
Is sea water salty?;Is the sea salty?|Yes, sea water is salty.|Yes
Does wood float?;Can wood float?|Yes, wood floats on water.|Yes
Does iron float?;Does a stone float?|No, it sinks in water.|No
Can a fish swim?|Yes, a fish can swim.|Yes
Can a bird fly?|Yes, most birds can fly.|Yes
Can a penguin fly?|No, a penguin can not fly.|No
Can a pig fly?;Can a dog fly?;Can a cow fly?|No, it can not fly.|No
Which animal is the largest?;What is the largest animal?|The blue whale is the largest animal.|Whale
Which animal has a long neck?|The giraffe has a long neck.|Giraffe
Which animal has a trunk?|The elephant has a trunk.|Elephant
What is the largest ocean?;Which ocean is the largest?|The largest ocean is the Pacific.|Pacific
What is the highest mountain?|The highest mountain is Mount Everest.|Everest
Which planet do we live on?|We live on the planet Earth.|Earth
What is the closest star?|The sun is the closest star to us.|Sun
What do plants need?|Plants need light, water and air.
What do fish live in?|Fish live in water.|Water
At what heat does water boil?|Water boils at 100 degrees.|100
At what heat does water freeze?|Water freezes at 0 degrees.|0
""")

# question forms | answer
CHAT = rows("""
Hello.;Hello!;Hi.;Hi!;Hey!;Hi there!;Hello there.;Hey there!|Hello! How can I help you?
Good morning.;Good morning!|Good morning! How can I help you?
Good afternoon.;Good afternoon!|Good afternoon! How can I help you?
Good evening.;Good evening!|Good evening! How can I help you?
How are you?;How are you today?;How do you do?;Are you well?|I am fine, thank you.\
 How can I help you?
Thank you.;Thanks.;Thanks!;Thank you very much.;Many thanks.;Thank you so much!|You are welcome.
That was helpful.;Great answer!;Well done!;Good job.;You are right.;Very good.|I am glad to help.
Goodbye.;Bye!;Bye.;Goodbye!;See you later.;See you!;I have to go now.;That is all.|\
Goodbye! Have a nice day.
Good night.;Good night!|Good night! Sleep well.
I am sad.;I feel sad today.;I had a bad day.|I am sorry to hear that. I hope you feel better soon.
I am happy.;I feel happy today.;I had a good day.|I am happy to hear that.
I am tired.;I feel tired.;I am so tired today.|You should rest for a while.
I am hungry.;I feel hungry.|You should eat something.
I am thirsty.;I feel thirsty.|You should drink some water.
I am cold.;I feel cold.|You should put on a warm coat.
I am bored.;I feel bored.|You could read a book or go for a walk.
I am sick.;I feel sick.;I feel ill.|You should rest and see a doctor.
I am lost.;I lost my way.|You could ask someone or look at a map.
It is raining.;It rains today.|Take an umbrella with you.
Sorry.;I am sorry.;Excuse me.|No problem.
Yes.;Yes, please.;Okay.;Sure.|Good. What would you like to know?
No.;No, thank you.;No, thanks.|All right. Tell me if you need anything.
Can you help me?;Please help me.;I need help.;Could you help me?;Help me, please.|\
Yes, I can help you. What do you need?
I have a question.;May I ask something?;Can I ask you something?;I want to ask you something.|\
Yes, please ask.
Who are you?;What are you?;Tell me who you are.;Who is this?;Who am I talking to?;\
What kind of thing are you?;Introduce yourself.;Tell me about yourself.;\
Can you introduce yourself?;Please say who you are.|I am a small language model.
Are you a person?;Are you human?;Are you a human?;Am I talking to a person?|\
No, I am a small language model.
Are you a robot?;Are you a computer?;Are you a machine?;Are you a program?;\
Are you a language model?|Yes, I am a small language model.
What is your name?;Do you have a name?;Tell me your name.;What are you called?;\
How should I call you?;What should I call you?;What can I call you?;May I know your name?;\
Your name, please?;Say your name.|I have no name.
Who made you?;Who built you?;Where do you come from?;How were you made?;Who created you?;\
Who trained you?;What were you trained on?|I was trained from simple text.
What can you do?;What can you help with?;What do you know?;How can you help me?;\
What are you good at?|I can answer simple questions.
Where do you live?;Where are you?;What is your home?|I am a program and live in a computer.
How old are you?;What is your age?;When were you born?|I am a program and have no age.
Where do you work?;Who do you work for?;What is your job?;What do you do?|I answer simple questions.
Do you sleep?;Do you eat?;Do you drink tea?;Can you walk?;Can you see me?;Do you have a body?|\
No, I am only a program.
Do you like music?;Do you like fish?;Do you like me?;What do you like?;Do you have feelings?|\
I am a program and have no feelings.
Do you know everything?;Are you always right?;Can you be wrong?|No, I know only simple things.
""")

# Ordinary words for sentences and stories, so that their tokens mean something to the model.
PEOPLE = words("""
sailor captain farmer baker painter carpenter teacher nurse doctor girl boy woman man
child worker builder fisherman cook driver visitor owner neighbour guest friend grandmother
grandfather uncle aunt sister brother mechanic gardener shopkeeper clerk guard student boss
customer helper stranger welder""")
FIRST_NAMES = words("""
Anna Tom Lucy Ben Emma Jack Clara Paul Nina Peter Rosa David Julia Mark Lena Simon
Olga Victor Grace Henry Alice Oscar Ruth Martin Iris Felix Nora Hugo Vera Leo Ella Adam Maria Sam
Jane Philip Kate George Sara Robert""")
ANIMAL_WORDS = words("""dog cat horse bird duck goat rabbit fox owl mouse gull seal parrot hen sheep
donkey puppy kitten""")
ADJECTIVES = words("""
old new small big red blue green white black long short heavy light strong clean
dirty wet dry warm cold quiet loud bright dark broken wooden rusty brass fresh empty full cheap
expensive famous friendly lazy clever brave gentle careful proud calm busy grey yellow round flat
sharp soft hard simple strange lovely narrow wide oldest""")
THINGS = words("""boat ship sail mast hull rope anchor net oar engine hammer saw drill brush bucket
ladder box barrel plank nail screw bolt chain lamp bell key lock door gate window bench table chair
cup kettle plate basket bag coat hat boot glove book letter map bill note coin paint tar varnish
crane pump wheel cart bottle clock flag sign whistle radio telephone password ticket price stove
toolbox propeller rudder deck cabin pipe wire motor trailer crate blanket cushion""")
LOCATIONS = words("""
harbour dock pier beach island bay river lake village town market shop bakery garden
kitchen workshop yard boatyard garage office school library hut shed barn farm forest hill bridge
lighthouse tower station church square street cafe store cellar roof slipway quay coast shore""")
VERBS = pairs("""
repair=repaired, paint=painted, carry=carried, clean=cleaned, find=found, buy=bought, sell=sold
build=built, move=moved, lift=lifted, open=opened, close=closed, lose=lost, bring=brought
hide=hid, show=showed, wash=washed, watch=watched, borrow=borrowed, fix=fixed, check=checked
cover=covered, push=pushed, pull=pulled, drop=dropped, take=took, leave=left, need=needed
want=wanted, see=saw, choose=chose, keep=kept, count=counted, draw=drew, measure=measured
store=stored, launch=launched, load=loaded, tie=tied, mend=mended, scrub=scrubbed, use=used
""")
TIMES = (
    "in the morning", "in the evening", "at noon", "at night", "on Monday", "on Sunday", "today",
    "every day", "in summer", "in winter", "before lunch", "after work", "at eight", "at five",
    "last week", "once a year", "for three days", "in the rain", "with great care", "by hand",
    "very slowly", "for free", "since 1950", "until six", "on weekends", "all year", "for 20 coins",
    "for 75 coins a month", "without a word", "together", "with a smile", "on the left side",
)  # fmt: skip
WEATHER = words("sunny windy rainy cloudy foggy stormy snowy icy warm cold")
LESSONS = (
    "From that day on, they were good friends.",
    "In the end, everyone was happy.",
    "It was a good day.",
    "They laughed and drank tea together.",
    "So the work was done before dark.",
    "Nobody was angry any more.",
    "They never forgot that day.",
)


# ---------------------------------------------------------------- facts


def capital_facts() -> list[Fact]:
    """Capitals and continents."""
    facts = []
    for country, city, continent in COUNTRIES:
        facts.append(Fact((
            f"What is the capital of {country}?",
            f"What is the capital city of {country}?",
            f"Which city is the capital of {country}?",
            f"Name the capital of {country}.",
            f"Tell me the capital of {country}.",
            f"Do you know the capital of {country}?",
            f"What is {country}'s capital?",
        ), f"The capital of {country} is {city}.", city))  # fmt: skip
        facts.append(Fact((
            f"{city} is the capital of which country?",
            f"Which country has {city} as its capital?",
            f"What country is {city} the capital of?",
            f"Which country is {city} in?",
        ), f"{city} is the capital of {country}.", country))  # fmt: skip
        facts.append(Fact((
            f"Where is {country}?",
            f"Which continent is {country} in?",
            f"On which continent is {country}?",
        ), f"{country} is in {continent}.", continent))  # fmt: skip
    return facts


def animal_facts() -> list[Fact]:
    """Sounds, legs, homes, kinds, young and food of animals."""
    facts = []
    for name, sound, legs, home, kind, baby, food in ANIMALS:
        a = article(name)
        if sound:
            facts.append(Fact((
                f"What sound does {a} make?",
                f"What noise does {a} make?",
                f"Which sound does the {name} make?",
                f"What does {a} sound like?",
            ), f"{capital(a)} {sound}.", capital(sound)))  # fmt: skip
        facts.append(Fact((
            f"How many legs does {a} have?",
            f"How many legs has {a} got?",
            f"Tell me how many legs {a} has.",
            f"Count the legs of {a}.",
        ), f"{capital(a)} has {legs} legs.", capital(legs)))  # fmt: skip
        facts.append(Fact((
            f"Where does {a} live?",
            f"Where can I find {a}?",
            f"What is the home of {a}?",
            f"Where does the {name} live?",
        ), f"{capital(a)} lives {home}."))  # fmt: skip
        facts.append(Fact((
            f"What kind of animal is {a}?",
            f"What type of animal is {a}?",
            f"What sort of animal is the {name}?",
        ), f"{capital(a)} is {article(kind)}.", capital(kind)))  # fmt: skip
        facts.append(Fact((
            f"What is a baby {name} called?",
            f"What do you call a young {name}?",
            f"What is the name of a young {name}?",
        ), f"A baby {name} is called {article(baby)}.", capital(baby)))  # fmt: skip
        facts.append(Fact((
            f"What does {a} eat?",
            f"What do you feed {a}?",
            f"What is the food of {a}?",
        ), f"{capital(a)} eats {food}.", capital(food)))  # fmt: skip
    return facts


def colour_facts() -> list[Fact]:
    """Colours of things."""
    return [
        Fact(
            (
                f"What colour is {thing}?",
                f"Which colour is {thing}?",
                f"What is the colour of {thing}?",
                f"Tell me the colour of {thing}.",
                f"What colour does {thing} have?",
            ),
            f"{capital(thing)} is {colour}.",
            capital(colour),
        )
        for thing, colour in COLOURS.items()
    ]


def opposite_facts() -> list[Fact]:
    """Opposites, asked in both directions; a word's first pair wins."""
    table: dict[str, str] = {}
    for left, right in OPPOSITES.items():
        table.setdefault(left, right)
        table.setdefault(right, left)
    return [
        Fact(
            (
                f"What is the opposite of {word}?",
                f"Tell me the opposite of {word}.",
                f"Which word is the opposite of {word}?",
                f"Give me the opposite of {word}.",
                f"{capital(word)} is the opposite of what?",
            ),
            f"The opposite of {word} is {other}.",
            capital(other),
        )
        for word, other in table.items()
    ]


def calendar_facts() -> list[Fact]:
    """Days and months, with the ones before and after them."""
    facts = []
    for kind, names in (("day", DAYS), ("month", MONTHS)):
        for i, name in enumerate(names):
            following = names[(i + 1) % len(names)]
            previous = names[i - 1]
            facts.append(Fact((
                f"What {kind} comes after {name}?",
                f"Which {kind} comes after {name}?",
                f"What is the {kind} after {name}?",
                f"Which {kind} follows {name}?",
                f"What comes after {name}?",
            ), f"{following} comes after {name}.", following))  # fmt: skip
            facts.append(Fact((
                f"What {kind} comes before {name}?",
                f"Which {kind} comes before {name}?",
                f"What is the {kind} before {name}?",
                f"What comes before {name}?",
            ), f"{previous} comes before {name}.", previous))  # fmt: skip
    for i, name in enumerate(DAYS):
        tomorrow = DAYS[(i + 1) % 7]
        facts.append(Fact((
            f"Today is {name}. What day is tomorrow?",
            f"If today is {name}, what day is tomorrow?",
        ), f"Tomorrow is {tomorrow}.", tomorrow))  # fmt: skip
        facts.append(Fact((
            f"Today is {name}. What day was yesterday?",
            f"If today is {name}, what day was yesterday?",
        ), f"Yesterday was {DAYS[i - 1]}.", DAYS[i - 1]))  # fmt: skip
    for name, length in zip(MONTHS, MONTH_LENGTHS, strict=True):
        facts.append(Fact((
            f"How many days does {name} have?",
            f"How many days are in {name}?",
        ), f"{name} has {length} days.", str(length)))  # fmt: skip
    return facts


def category_facts() -> list[Fact]:
    """What kind of thing a thing is."""
    facts = []
    for kind, plural, members in CATEGORIES:
        for name in members.split():
            a = name if name in MASS else article(name)
            facts.append(Fact((
                f"What kind of thing is {a}?",
                f"What category is {a} in?",
                f"Which group does {a} belong to?",
                f"What type of thing is {a}?",
            ), f"{capital(a)} is {article(kind)}.", capital(kind)))  # fmt: skip
            facts.append(Fact((
                f"Is {a} {article(kind)}?",
            ), f"Yes, {a} is {article(kind)}.", "Yes"))  # fmt: skip
        first, second, third = members.split()[:3]
        facts.append(Fact((
            f"Name three {plural}.",
            f"Can you name three {plural}?",
            f"Give me three examples of {plural}.",
            f"List three {plural}.",
        ), f"Three {plural} are {first}, {second} and {third}."))  # fmt: skip
        facts.append(Fact((
            f"Name {article(kind)}.",
            f"Give me an example of {article(kind)}.",
            f"Can you name {article(kind)}?",
        ), f"One example is {first}.", capital(first)))  # fmt: skip
    return facts


def definition_facts() -> list[Fact]:
    """Simple definitions."""
    return [
        Fact(
            (
                f"What is {article(name)}?",
                f"What does the word {name} mean?",
                f"Explain the word {name}.",
                f"What do you call {article(name)}, and what is it?",
                f"Tell me what {article(name)} is.",
                f"What is meant by {name}?",
                f"Define {name}.",
            ),
            f"{capital(article(name))} is {meaning}.",
        )
        for name, meaning in DEFINITIONS
    ]


def use_facts() -> list[Fact]:
    """What tools are for, asked in both directions."""
    facts = []
    for name, use in USES:
        a = name if name in NO_ARTICLE else article(name)
        verb = "are" if name == "scissors" else "is"
        facts.append(Fact((
            f"What {verb} {a} used for?",
            f"What {verb} {a} for?",
            f"What can I do with {a}?",
            f"What do people do with {a}?",
            f"Why do people use {a}?",
        ), f"{capital(a)} {verb} used to {use}."))  # fmt: skip
        facts.append(Fact((
            f"What do I need to {use}?",
            f"Which tool do I use to {use}?",
            f"What should I use to {use}?",
        ), f"You can use {a} to {use}.", capital(name)))  # fmt: skip
    return facts


def job_facts() -> list[Fact]:
    """What people do at work, asked in both directions."""
    facts = []
    for name, work in JOBS:
        facts.append(Fact((
            f"What does {article(name)} do?",
            f"What is the job of {article(name)}?",
            f"What is the work of {article(name)}?",
            f"Tell me what {article(name)} does.",
        ), f"{capital(article(name))} {work}."))  # fmt: skip
        facts.append(Fact((
            f"Who {work}?",
            f"Which person {work}?",
            f"Which worker {work}?",
        ), f"{capital(article(name))} {work}.", capital(name)))  # fmt: skip
    return facts


def addressed(activity: str, owner: str, subject: str) -> str:
    """The activity with 'my' and 'I' turned to someone else."""
    return activity.replace(" my ", f" {owner} ").replace(" I am ", f" {subject} are ")


def place_facts() -> list[Fact]:
    """Where things are done."""
    return [
        Fact((
            f"Where can I {activity}?",
            f"Where do people {addressed(activity, 'their', 'they')}?",
            f"Where should I go to {activity}?" if where.startswith("at") else
            f"What is a good place to {activity}?",
            f"Tell me where I can {activity}.",
        ), f"You can {addressed(activity, 'your', 'you')} {where}.")
        for activity, where in PLACES
    ]  # fmt: skip


def advice_facts() -> list[Fact]:
    """Simple how-to advice."""
    return [
        Fact(
            (
                f"How do I {task}?",
                f"How can I {task}?",
                f"What is the best way to {task}?",
                f"I want to {task}. What should I do?",
                f"Tell me how to {task}.",
                f"Please explain how to {task}.",
                f"Can you tell me how to {task}?",
            ),
            advice,
        )
        for task, advice in ADVICE
    ]


def table_facts(table: list[list[str]]) -> list[Fact]:
    """Facts from a table of 'form;form|answer|short' rows."""
    return [
        Fact(tuple(row[0].split(";")), row[1], row[2] if len(row) > 2 else None) for row in table
    ]


# ---------------------------------------------------------------- made-up exchanges

SYLLABLES = words("""bra kel zor min tav dro lum pex vin qua rin sol tor wex yal zim fen gor hul jas
kri lor mab nex oth pil rud sev tam ulm vor wil xan yor zed bel cor dar eth fal gil hex ist jun kal
lem mor nar orb pol ros sil tur ven wor bur cas del fro gal har lin mar nor pen ral san tel wen""")
ENDINGS = words("a o en ia is us on er et ik by ton ham wick land ford mere vale dale ley")


def invented_name(rng: random.Random) -> str:
    """A name that means nothing."""
    parts = [rng.choice(SYLLABLES) for _ in range(rng.choice((1, 1, 2)))]
    return capital("".join(parts) + rng.choice(ENDINGS))


def unknown_exchange(rng: random.Random) -> Exchange:
    """A question about something made up or private, which nobody can answer from text."""
    name = invented_name(rng)
    person = f"{rng.choice((*FIRST_NAMES, invented_name(rng)))} {name}"
    kind = rng.choice(LOCATIONS)
    company = rng.choice(
        (f"the {name} {kind}", f"the {kind} in {name}", name, f"the {kind}", f"your {kind}",
         f"the {rng.choice(ADJECTIVES)} {kind}", f"{name} {capital(kind)}", f"this {kind}", "here")
    )  # fmt: skip
    at = company if company == "here" else f"at {company}"
    place = "it" if company == "here" else company
    thing = rng.choice(THINGS)
    animal = rng.choice(ANIMAL_WORDS)
    verb, past = rng.choice(list(VERBS.items()))
    question = rng.choice((
        f"Who is {person}?", f"Do you know {person}?", f"Where does {person} live?",
        f"How old is {person}?", f"What is the job of {person}?", f"Tell me about {person}.",
        f"When was {person} born?", f"What does {person} like?", f"Where is {name}?",
        f"What is {name}?", f"Tell me about {name}.", f"What is the capital of {name}?",
        f"What is a {name.lower()}?", f"What does the word {name.lower()} mean?",
        f"What colour is a {name.lower()}?", f"What sound does a {name.lower()} make?",
        f"How many people live in {name}?", f"How do I get to {name}?",
        f"Who owns {place}?", f"Who is the owner of {place}?", f"Who runs {place}?",
        f"What is the name of the owner {at}?", f"Who is the boss {at}?", f"Who works {at}?",
        f"When does {place} open?", f"When does {place} close?", "When do you open?",
        f"What are the opening hours {at}?", f"What time does {place} open in the morning?",
        f"Which day is {place} closed?", f"Is {place} open on {rng.choice(DAYS)}?",
        f"How much does it cost to {verb} a {thing} {at}?", f"How much is a {thing} {at}?",
        f"What is the price of a {thing} {at}?", f"What do I pay for a {thing} {at}?",
        f"How much do you charge to {verb} a {thing}?", f"Can I pay with a card {at}?",
        f"What is the {animal} {at} called?", f"What is the name of the {animal} {at}?",
        f"Is there a {animal} {at}?", f"What is the {animal}'s name?",
        "What is the wifi password?", f"What is the wifi password {at}?",
        f"Is there wifi {at}?", f"How do I get on the internet {at}?",
        f"What is the number of the {thing} {at}?", f"Which {kind} number is it?",
        f"What is the phone number of {place}?", f"How can I call {place}?",
        f"What is the address of {place}?", f"Where can I find {place}?",
        f"What is the name of your {kind}?", f"What is this {kind} called?",
        f"When was {place} built?", f"How old is {place}?", f"Since when is {place} open?",
        f"Who {past} the {thing} {at}?", f"Where is the {thing} {at}?",
        f"Where is my {thing}?", f"What is in my {rng.choice(words('bag box pocket hand'))}?",
        f"How heavy is the {thing} {at}?", f"How many {thing}s are there {at}?",
        f"How much can the {thing} {at} lift?", f"What do they serve {at}?",
        f"Which is the oldest {thing} {at}?", f"What drink can I get {at}?",
        f"Where is the nearest {kind}?", f"Who won the game in {name}?",
        "What time is it?", f"What is the weather like in {name}?",
        "What did I eat yesterday?", f"What is the secret of {name}?",
        f"What is the plan of {place}?", f"What does the {name} project do?",
        f"Which {thing} does {person} use?", f"Where do I find the {thing} {at}?",
    ))  # fmt: skip
    return Exchange(question, UNKNOWN, "Unknown")


def sum_exchange(rng: random.Random) -> Exchange:
    """A sum or difference of small numbers, or the number next to one."""
    form = rng.randrange(4)
    if form < 2:
        total = rng.randint(0, 20)
        a = rng.randint(0, total)
        b = total - a
        question = rng.choice((
            f"What is {a} plus {b}?", f"What is {a} + {b}?", f"{a} + {b} = ?", f"Add {a} and {b}.",
            f"How much is {a} plus {b}?", f"What do you get if you add {a} and {b}?",
            f"Calculate {a} + {b}.",
        ))  # fmt: skip
        return Exchange(question, f"{a} plus {b} is {total}.", str(total))
    if form == 2:
        a = rng.randint(0, 20)
        b = rng.randint(0, a)
        question = rng.choice((
            f"What is {a} minus {b}?", f"What is {a} - {b}?", f"{a} - {b} = ?",
            f"How much is {a} minus {b}?", f"Take {b} away from {a}.",
        ))  # fmt: skip
        return Exchange(question, f"{a} minus {b} is {a - b}.", str(a - b))
    a = rng.randint(1, 30)
    if rng.random() < 0.5:
        question = rng.choice((f"What number comes after {a}?", f"Which number follows {a}?"))
        return Exchange(question, f"{a + 1} comes after {a}.", str(a + 1))
    question = rng.choice((f"What number comes before {a}?", f"Which number is before {a}?"))
    return Exchange(question, f"{a - 1} comes before {a}.", str(a - 1))


def yes_no_exchange(rng: random.Random) -> Exchange:
    """A check of a capital, a colour or a category, true or false."""
    truth = rng.random() < 0.5
    form = rng.randrange(3)
    if form == 0:
        country, city, _ = rng.choice(COUNTRIES)
        asked = city if truth else rng.choice([row[1] for row in COUNTRIES if row[1] != city])
        question = rng.choice((
            f"Is {asked} the capital of {country}?", f"Is the capital of {country} {asked}?",
        ))  # fmt: skip
        fact = f"the capital of {country} is {city}."
    elif form == 1:
        thing, colour = rng.choice(list(COLOURS.items()))
        others = sorted(set(COLOURS.values()) - {colour})
        question = f"Is {thing} {colour if truth else rng.choice(others)}?"
        fact = f"{thing} is {colour}."
    else:
        kind, _, members = rng.choice(CATEGORIES[:13])
        name = rng.choice(members.split())
        other = rng.choice([row[0] for row in CATEGORIES[:13] if row[0] != kind])
        a = name if name in MASS else article(name)
        question = f"Is {a} {article(kind if truth else other)}?"
        fact = f"{a} is {article(kind)}."
    return Exchange(question, f"{'Yes' if truth else 'No'}, {fact}", "Yes" if truth else "No")


def sentence(rng: random.Random) -> str:
    """One plain sentence with ordinary words."""
    who = rng.choice(PEOPLE)
    past = rng.choice(list(VERBS.values()))
    thing = rng.choice(THINGS)
    place = rng.choice(LOCATIONS)
    when = rng.choice(TIMES)
    a, b = rng.sample(ADJECTIVES, 2)
    name = rng.choice(FIRST_NAMES)
    return rng.choice((
        f"The {who} {past} the {thing} {when}.",
        f"The {a} {who} {past} a {b} {thing} at the {place}.",
        f"{name} {past} the {a} {thing} near the {place} {when}.",
        f"There is a {a} {thing} in the {place}.",
        f"We {past} {rng.randint(2, 99)} {thing}s {when}.",
        f"Our {thing} is {a} and {b}, but the {who} likes it.",
        f"You must not leave your {thing} behind the {place}.",
        f"The price of the {thing} is {rng.randint(2, 999)} coins.",
        f"It was {rng.choice(WEATHER)} at the {place}, so the {who} stayed with the {thing}.",
        f"{name}'s {rng.choice(ANIMAL_WORDS)} sleeps under the {a} {thing} {when}.",
        f"They have {past} the {thing}, and now it is {a}.",
        f"Please ask {name}, the {who} from the {place}.",
        f"I think that the {place} is {a}; it has only one {thing}!",
        f"My {who} says: \"The {thing} belongs to {name}.\"",
    ))  # fmt: skip


def vocabulary_word(rng: random.Random) -> str:
    """Any ordinary word."""
    table = rng.choice((PEOPLE, ADJECTIVES, THINGS, LOCATIONS, list(VERBS), ANIMAL_WORDS))
    return rng.choice(table)


def repeat_exchange(rng: random.Random) -> Exchange:
    """Something to say again exactly: a sentence, a name, numbers or any printable characters."""
    form = rng.randrange(8)
    if form < 4:
        text = sentence(rng)
    elif form == 4:
        text = f"{invented_name(rng)} {invented_name(rng)}"
    elif form == 5:
        text = " ".join(vocabulary_word(rng) for _ in range(rng.randint(1, 6)))
    elif form == 6:
        text = str(rng.randint(0, 9999))
    else:
        text = "".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(1, 8)))
    question = rng.choice(("Repeat this: ", "Say this again: ", "Repeat after me: ", "Copy: "))
    return Exchange(question + text, text)


def word_exchange(rng: random.Random) -> Exchange:
    """Small tasks with one word."""
    word = vocabulary_word(rng)
    form = rng.randrange(5)
    if form == 0:
        question = rng.choice((f"Spell the word {word}.", f"How do you spell {word}?"))
        return Exchange(question, "-".join(word.upper()))
    if form == 1:
        question = rng.choice((
            f"What is the first letter of {word}?", f"Which letter does {word} start with?",
        ))  # fmt: skip
        letter = word[0].upper()
        return Exchange(question, f"The first letter of {word} is {letter}.", letter)
    if form == 2:
        verb, past = rng.choice(list(VERBS.items()))
        question = rng.choice((
            f"What is the past of {verb}?", f"What is the past form of {verb}?",
        ))  # fmt: skip
        return Exchange(question, f"The past of {verb} is {past}.", capital(past))
    if form == 3:
        thing = rng.choice(THINGS)
        question = rng.choice((
            f"Make a sentence with the word {thing}.", f"Use the word {thing} in a sentence.",
        ))  # fmt: skip
        who, past = rng.choice(PEOPLE), rng.choice(list(VERBS.values()))
        return Exchange(question, f"The {who} {past} the {thing} {rng.choice(TIMES)}.")
    question = rng.choice((f"Write {word} in capital letters.", f"Write {word} in upper case."))
    return Exchange(question, word.upper())


def story_exchange(rng: random.Random) -> Exchange:
    """A story of a few sentences about a person, a thing and a place."""
    who, other = rng.sample(PEOPLE, 2)
    animal = rng.choice(ANIMAL_WORDS)
    thing = rng.choice(THINGS)
    place = rng.choice(LOCATIONS)
    adjective, mood = rng.sample(ADJECTIVES, 2)
    name = rng.choice(FIRST_NAMES)
    middle = rng.choice((
        f"One day the {thing} was broken, and {name} did not know what to do.",
        f"One {rng.choice(WEATHER)} day a {adjective} {other} came and asked for the {thing}.",
        f"In the night a storm came and took the {thing} away.",
        f"Every morning {name} looked for the {adjective} {thing}.",
        f"On {rng.choice(DAYS)} the {thing} was gone.",
    ))  # fmt: skip
    turn = rng.choice((
        f"The {other} brought some tools and they repaired it together.",
        f"A {mood} {animal} found it behind the {rng.choice(LOCATIONS)}.",
        f"{name} asked the {other} for help.",
        f"The {other} said: \"Do not worry, I have a new one.\"",
        f"It cost {rng.randint(3, 90)} coins, but the {other} paid for it.",
    ))  # fmt: skip
    start = rng.choice((
        f"{name} was a {who} who lived near the {place}.",
        f"Once there was a {who} called {name}, who worked at the {place}.",
        f"A {mood} {who} named {name} had a {adjective} {thing}.",
    ))  # fmt: skip
    question = rng.choice((
        f"Tell me a story about a {who}.", f"Tell me a short story about a {who}.",
        f"Write a story about a {who} and a {thing}.", f"Please tell me a story about a {thing}.",
    ))  # fmt: skip
    return Exchange(question, f"{start} {middle} {turn} {rng.choice(LESSONS)}")


def memory_exchanges(rng: random.Random) -> list[Exchange]:
    """Two turns: the user says something, and asks for it."""
    name = rng.choice((*FIRST_NAMES, invented_name(rng)))
    thing = rng.choice(THINGS)
    place = rng.choice(LOCATIONS)
    told, asked, answer = rng.choice((
        (f"My name is {name}.", "What is my name?", f"Your name is {name}."),
        (f"I am {name}.", "Who am I?", f"You are {name}."),
        (f"I have a {thing}.", "What do I have?", f"You have a {thing}."),
        (f"I work at the {place}.", "Where do I work?", f"You work at the {place}."),
        (f"My dog is called {name}.", "What is my dog called?", f"Your dog is called {name}."),
    ))  # fmt: skip
    reply = f"Nice to meet you, {name}." if "name" in asked or "Who" in asked else "That is nice."
    return [Exchange(told, reply), Exchange(asked, answer)]


# ---------------------------------------------------------------- conversations

STATIC: dict[str, list[Fact]] = {
    "capitals": capital_facts(),
    "animals": animal_facts(),
    "colours": colour_facts(),
    "opposites": opposite_facts(),
    "calendar": calendar_facts(),
    "categories": category_facts(),
    "definitions": definition_facts(),
    "uses": use_facts(),
    "jobs": job_facts(),
    "places": place_facts(),
    "advice": advice_facts(),
    "general": table_facts(GENERAL),
    "chat": table_facts(CHAT),
}
MADE_UP: dict[str, Callable[[random.Random], Exchange]] = {
    "unknown": unknown_exchange,
    "sums": sum_exchange,
    "yes_no": yes_no_exchange,
    "repeat": repeat_exchange,
    "words": word_exchange,
    "story": story_exchange,
}
WEIGHTS = {
    "capitals": 13, "animals": 12, "colours": 5, "opposites": 6, "calendar": 5, "categories": 10,
    "definitions": 8, "uses": 7, "jobs": 4, "places": 3, "advice": 6, "general": 6, "chat": 8,
    "unknown": 14, "sums": 7, "yes_no": 5, "repeat": 5, "words": 3, "story": 3,
}  # fmt: skip
LEAD_INS = ("Please tell me: ", "I have a question. ", "Hello! ", "Hi, ", "Tell me, ", "Okay. ")


def vary(question: str, rng: random.Random) -> str:
    """The question, now and then with a lead-in or less care in its writing."""
    draw = rng.random()
    if draw < 0.06:
        return rng.choice(LEAD_INS) + question
    if draw < 0.10:
        return question[0].lower() + question[1:]
    if draw < 0.13:
        return question.rstrip("?.!")
    if draw < 0.15:
        return question.lower().rstrip("?.!")
    if draw < 0.17 and question.endswith("?"):
        return f"{question[:-1]}, please?"
    return question


def exchange(rng: random.Random) -> Exchange:
    """One exchange of a random topic."""
    topic = rng.choices(list(WEIGHTS), weights=list(WEIGHTS.values()))[0]
    if topic in MADE_UP:
        made = MADE_UP[topic](rng)
        # What is to be repeated or spelled must reach the model as it is.
        return (
            made
            if topic in ("repeat", "words")
            else made._replace(question=vary(made.question, rng))
        )
    fact = rng.choice(STATIC[topic])
    return Exchange(vary(rng.choice(fact.questions), rng), fact.answer, fact.short)


def conversation(rng: random.Random) -> list[Message]:
    """One conversation of one to four turns, about half of them under a system prompt."""
    turns = rng.choices((1, 2, 3, 4), weights=(50, 25, 15, 10))[0]
    draw = rng.random()
    system = None
    one_word = False
    if draw < 0.42:
        system = rng.choice(PLAIN_SYSTEMS)
    elif draw < 0.52:
        system = rng.choice(ONE_WORD_SYSTEMS)
        one_word = True
    exchanges: list[Exchange] = []
    while len(exchanges) < turns:
        if turns > 1 and not one_word and rng.random() < 0.05:
            exchanges += memory_exchanges(rng)
            continue
        made = exchange(rng)
        if one_word and made.short is None:
            continue
        exchanges.append(made)
    messages = [{"role": "system", "content": system}] if system else []
    for made in exchanges:
        answer = f"{made.short}." if one_word else made.answer
        messages.append({"role": "user", "content": made.question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def conversations(count: int, seed: int) -> Iterator[list[Message]]:
    """The first count conversations of a seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield conversation(rng)


# What the base should know: a question, and a part of its right answer.
QUIZ: list[tuple[str, str]] = [
    ("What is the capital of France?", "Paris"),
    ("Name the capital of Norway.", "Oslo"),
    ("Which city is the capital of Japan?", "Tokyo"),
    ("Tell me the capital of Peru.", "Lima"),
    ("What is the capital city of Kenya?", "Nairobi"),
    ("What is the capital of Canada?", "Ottawa"),
    ("Which country has Vienna as its capital?", "Austria"),
    ("Cairo is the capital of which country?", "Egypt"),
    ("Where is Chile?", "South America"),
    ("Which continent is India in?", "Asia"),
    ("What sound does a dog make?", "barks"),
    ("What noise does a duck make?", "quacks"),
    ("How many legs does a spider have?", "eight"),
    ("How many legs does a horse have?", "four"),
    ("Where does a bee live?", "hive"),
    ("What kind of animal is a shark?", "fish"),
    ("What is a baby cow called?", "calf"),
    ("What do you call a young cat?", "kitten"),
    ("What does a rabbit eat?", "carrots"),
    ("What colour is grass?", "green"),
    ("What colour is a banana?", "yellow"),
    ("Which colour is snow?", "white"),
    ("What is the colour of coal?", "black"),
    ("What is the opposite of hot?", "cold"),
    ("What is the opposite of empty?", "full"),
    ("Tell me the opposite of early.", "late"),
    ("What day comes after Monday?", "Tuesday"),
    ("Which day comes before Sunday?", "Saturday"),
    ("What month comes after March?", "April"),
    ("Which month comes before January?", "December"),
    ("How many days does April have?", "30"),
    ("If today is Friday, what day is tomorrow?", "Saturday"),
    ("What is 3 plus 4?", "is 7"),
    ("What is 9 + 6?", "is 15"),
    ("Add 8 and 2.", "is 10"),
    ("What is 10 minus 4?", "is 6"),
    ("What number comes after 12?", "13"),
    ("What kind of thing is an apple?", "fruit"),
    ("What kind of thing is a hammer?", "tool"),
    ("What category is a violin in?", "instrument"),
    ("Is a carrot a vegetable?", "Yes"),
    ("Is a rose a tool?", "No"),
    ("What is a harbour?", "boats"),
    ("What is an island?", "water all around"),
    ("What is a library?", "books"),
    ("What does the word anchor mean?", "hook"),
    ("What is a saw used for?", "cut wood"),
    ("What do I need to boil water?", "kettle"),
    ("What does a baker do?", "bread"),
    ("Who repairs pipes?", "plumber"),
    ("Where can I catch a train?", "station"),
    ("How do I make tea?", "Boil water"),
    ("How do I row a boat?", "oars"),
    ("How many days are in a week?", "seven"),
    ("What do bees make?", "honey"),
    ("Where does the sun rise?", "east"),
    ("Who are you?", "small language model"),
    ("What is your name?", "no name"),
    ("Who made you?", "simple text"),
    ("Thank you very much.", "welcome"),
    ("Who is Corvin Teldale?", "do not know"),
    ("When does the Gilmere bakery open?", "do not know"),
    ("What is the capital of Vorland?", "do not know"),
    ("How much does it cost to repair a sail at the Polwick yard?", "do not know"),
]


if __name__ == "__main__":
    for messages in conversations(20, 0):
        for message in messages:
            print(f"{message['role']}: {message['content']}")
        print()
