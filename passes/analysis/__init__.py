"""Analysis: facts about captured graphs; nothing here changes a graph."""
