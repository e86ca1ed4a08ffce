"""A knowledge base in Elasticsearch, for corpora that outgrow one machine.

address        elasticsearch://HOST:PORT/ALIAS, taken apart
connection     requests with retries
failures       what is told of those that fail
schema         what the index holds, and conditions as its queries
generations    which generations an alias has, and their names
opening        which of them a process opens; making one
publication    who writes to the live one, and the moment in which another takes its place
documents      writes that replace a document whole, whatever stops them, and reads of what is stored
difference     where two indexes hold different documents
copying        a generation brought up to date with the live one
inventory      what there is of an alias, without a bundle
doubt          documents that a search finds more of than is live
candidates     what the index proposes for a question; ranked by the same code as everywhere
knowledge_base all of it as one `KnowledgeBase`
"""
