{{/* Written by `make charts`: edit jobs/ or helm/exit_codes.py. */}}

{{- define "lorajob.failurePolicy" -}}
podFailurePolicy:
  rules:
  - action: Ignore
    onPodConditions:
    - type: DisruptionTarget
      status: 'True'
  - action: Ignore
    onExitCodes:
      containerName: lorajob
      operator: In
      values:
      - 20
  - action: FailJob
    onExitCodes:
      containerName: lorajob
      operator: In
      values:
      - 2
      - 3
      - 4
      - 5
      - 6
{{- end }}

{{- define "lorajob.terminationMessagePath" -}}
/dev/termination-log
{{- end }}

{{- define "lorajob.defaultGrace" -}}
120
{{- end }}
