"""The ground: what any command needs that is not about models.

Errors become exit codes and a paragraph (`command_line`, `exits`), files are written whole (`files`), rmjax's own
folders are known (`ownership`) and sealed with digests (`sealing`, `step_directory`), secrets stay hidden
(`passwords`), processes find each other, start, agree and end together (`cluster`, `processes`, `agreement`, `hub`),
signals ask a run to stop (`signals`), and compiled programs are kept (`compile_cache`).
"""
