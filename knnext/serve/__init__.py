"""A kNN-LM behind the HTTP interface of OpenAI, for clients that speak it.

`Engine` (knnext/serve/engine.py) writes texts for many requests at once: `Reader` runs the model
over them, `Mixer` searches and mixes. `Service` (knnext/serve/app.py) reads requests and puts the
answers into OpenAI's JSON. What listens and who is let in (`listening.py`, `guard.py`) also serves
`knnext explore`.
"""
