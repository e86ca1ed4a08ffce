"""Real texts that every export is compared on: questions, and passages from one line to longer than any window.

All of it is old enough to belong to everyone. A gate must not depend on files that a user may not have.
"""

from __future__ import annotations

QUESTIONS = (
    "Who brought forth a new nation?",
    "What did Alice see run by her?",
    "when was it that the author sailed as naturalist",
    "Why is the sea salt, and how does salinity vary between the oceans of the northern and the southern hemisphere?",
    "What is the air-speed velocity of an unladen swallow?",
    "¿Dónde está la biblioteca de São Paulo, and who runs it? 図書館はどこですか",
    "def mean(values): return sum(values) / len(values)  # what does it do?",
)

PASSAGES = (
    "Call me Ishmael.",
    "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs (1,234.56 €, 99 %).",
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and "
    "dedicated to the proposition that all men are created equal.",
    "So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), "
    "whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when "
    "suddenly a White Rabbit with pink eyes ran close by her.",
    "When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the distribution of the inhabitants "
    "of South America, and in the geological relations of the present to the past inhabitants of that continent. These facts "
    "seemed to me to throw some light on the origin of species, that mystery of mysteries, as it has been called by one of our "
    "greatest philosophers. On my return home, it occurred to me, in 1837, that something might perhaps be made out on this "
    "question by patiently accumulating and reflecting on all sorts of facts which could possibly have any bearing on it.",
    "Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so dedicated, can long "
    "endure. We are met on a great battle-field of that war. We have come to dedicate a portion of that field, as a final resting "
    "place for those who here gave their lives that that nation might live. It is altogether fitting and proper that we should do "
    "this. But, in a larger sense, we can not dedicate, we can not consecrate, we can not hallow this ground. The brave men, "
    "living and dead, who struggled here, have consecrated it, far above our poor power to add or detract. The world will little "
    "note, nor long remember what we say here, but it can never forget what they did here. It is for us the living, rather, to be "
    "dedicated here to the unfinished work which they who fought here have thus far so nobly advanced. It is rather for us to be "
    "here dedicated to the great task remaining before us, that from these honored dead we take increased devotion to that cause "
    "for which they gave the last full measure of devotion, that we here highly resolve that these dead shall not have died in "
    "vain, that this nation, under God, shall have a new birth of freedom, and that government of the people, by the people, for "
    "the people, shall not perish from the earth.",
)
LONG = " ".join(PASSAGES[2:]) * 2  # longer than any embedder's limit; cut to exactly that limit it is the longest row
