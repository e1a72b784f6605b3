"""Prompts: what a chat model is asked where no data is given, to compare its answers before and after.

Short, of many kinds, and written for this purpose: none is taken from a benchmark.
"""

PROMPTS = (
    "Explain in three sentences why the sky is blue.",
    "Write a polite e-mail that moves a meeting from Tuesday to Thursday.",
    "What is the difference between a list and a tuple in Python?",
    "A train leaves at 14:25 and arrives at 17:10. How long does the trip take? Show your steps.",
    "Give me five ideas for a vegetarian dinner that takes less than half an hour.",
    "Translate into French: 'The library closes at six, but the café stays open until eight.'",
    "Summarise in one paragraph how vaccines work.",
    "Write a short poem about a blacksmith at dawn.",
    "Which is heavier, a kilogram of feathers or a pound of iron, and why?",
    "Write a function in Python that returns the second largest number of a list.",
    "What should I check before buying a used bicycle?",
    "Explain compound interest to a twelve-year-old, with an example in numbers.",
    "List the planets of the solar system from the sun outwards.",
    "My plant's leaves are turning yellow. What may be the reasons?",
    "Write an SQL query for the ten customers with the highest total of orders.",
    "What were the main causes of the First World War?",
    "Suggest a title and an opening sentence for a mystery set in a lighthouse.",
    "If three painters need six hours for a fence, how long do nine painters need?",
    "What does the following command do: tar -xzf archive.tar.gz?",
    "Describe the water cycle step by step.",
    "Turn this into a formal sentence: 'can't make it, got stuck in traffic, sorry!'",
    "What are the advantages and drawbacks of working from home?",
    "Explain what a hash table is and why looking something up in it is fast.",
    "Name three rivers of South America and a country that each flows through.",
    "How do I politely refuse an invitation from a neighbour?",
    "Convert 72 degrees Fahrenheit into Celsius and show the formula.",
    "What is the moral of the fable of the tortoise and the hare?",
    "Plan a day in a city with two children when it rains.",
    "Write a JSON object for a book with title, author, year and two tags.",
    "Why do we have leap years?",
    "Give a definition of democracy, and one of its weaknesses.",
    "Correct the grammar: 'She don't likes that her brother have took the car.'",
)
