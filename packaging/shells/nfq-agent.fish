# Completion of nfq-agent in fish, by the command itself.
function __nfq_agent_answers
    set -l answers (env _NFQ_AGENT_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args _TYPER_COMPLETE_ARGS=(commandline -cp | string collect) nfq-agent 2>/dev/null)
    if set -q answers[1]
        printf '%s\n' $answers
    else
        __fish_complete_path (commandline -ct)
    end
end
complete --command nfq-agent --no-files --arguments '(__nfq_agent_answers)'
