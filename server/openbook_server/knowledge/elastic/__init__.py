"""A knowledge base in Elasticsearch, for corpora that outgrow one machine.

address        elasticsearch://HOST:PORT/ALIAS, taken apart
connection     requests with retries, and failures explained
schema         what the index holds, and conditions as its queries
generations    which index an alias means; making one, and switching to it
documents      writes that replace a document whole, whatever stops them, and reads of what is stored
candidates     what the index proposes for a question; ranked by the same code as everywhere
knowledge_base all of it as one `KnowledgeBase`
"""
