{{/* The pod of the run, and of the test that checks it. */}}

{{/* The Job's pod template: a dict of root and config, the ConfigMap's name. */}}
{{- define "lorajob.pod" -}}
{{- $values := .root.Values -}}
metadata:
  labels:
    {{- include "lorajob.labels" .root | nindent 4 }}
  {{- $annotations := dict }}
  {{- $port := include "lorajob.metricsPort" .root }}
  {{- if and $port $values.metrics.annotate }}
  {{- $annotations = dict "prometheus.io/scrape" "true" "prometheus.io/port" $port "prometheus.io/path" "/metrics" }}
  {{- end }}
  {{- with merge (dict) $values.extra.podAnnotations $annotations }}
  annotations:
    {{- range $key, $value := . }}
    {{ $key | quote }}: {{ $value | quote }}
    {{- end }}
  {{- end }}
spec:
  {{- include "lorajob.podSpec" (dict "root" .root "config" .config "args" (list "run") "gpu" true) | nindent 2 }}
{{- end }}

{{/* A pod's spec: a dict of root, config, args and gpu, whether it gets one. */}}
{{- define "lorajob.podSpec" -}}
{{- $values := .root.Values -}}
{{- $cache := include "lorajob.cacheClaim" .root -}}
restartPolicy: Never
terminationGracePeriodSeconds: {{ include "lorajob.grace" .root }}
serviceAccountName: {{ include "lorajob.serviceAccount" .root | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- if ge (int $values.security.uid) 0 }}
  runAsUser: {{ int $values.security.uid }}
  {{- end }}
  {{- if ge (int $values.security.gid) 0 }}
  runAsGroup: {{ int $values.security.gid }}
  {{- end }}
  {{- if ge (int $values.security.fsGroup) 0 }}
  fsGroup: {{ int $values.security.fsGroup }}
  # A volume of many files is not gone through at each start.
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- with $values.scheduling.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $values.scheduling.nodeSelector }}
nodeSelector:
  {{- range $key, $value := . }}
  {{ $key | quote }}: {{ $value | quote }}
  {{- end }}
{{- end }}
{{- if .gpu }}
{{- include "lorajob.gpuPlacement" .root }}
{{- else }}
# Claims that one node at a time may mount are where the run is.
affinity:
  podAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "lorajob.selector" .root | nindent 14 }}
{{- end }}
{{- include "lorajob.tolerations" .root }}
containers:
  - name: lorajob
    image: {{ include "lorajob.image" .root | quote }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    args: {{ toJson .args }}
    env:
      - name: LORAJOB_SPEC
        value: /etc/lorajob/spec.yaml
      - name: LORAJOB_WORK
        value: /work/runs
      - name: LORAJOB_CACHE
        value: /cache
      {{- range $values.credentials.keys }}
      - name: {{ .env | quote }}
        valueFrom:
          secretKeyRef:
            name: {{ .secret | quote }}
            key: {{ .key | quote }}
            {{- if .optional }}
            optional: true
            {{- end }}
      {{- end }}
      {{- with $values.extra.env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- with $values.credentials.env }}
    envFrom:
      {{- range . }}
      - secretRef:
          name: {{ .secret | quote }}
          {{- if .optional }}
          optional: true
          {{- end }}
      {{- end }}
    {{- end }}
    {{- if eq (first .args) "run" }}
    {{- with include "lorajob.metricsPort" .root }}
    ports:
      - name: metrics
        containerPort: {{ . }}
    {{- end }}
    {{- end }}
    resources:
      {{- include "lorajob.resources" . | nindent 6 }}
    securityContext:
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities:
        drop: [ALL]
    # The run writes here how it ended; one that was killed leaves the end of its log.
    terminationMessagePath: {{ include "lorajob.terminationMessagePath" . }}
    terminationMessagePolicy: FallbackToLogsOnError
    volumeMounts:
      - name: spec
        mountPath: /etc/lorajob
        readOnly: true
      - name: work
        mountPath: /work
      - name: {{ ternary "cache" "work" (ne $cache "") }}
        mountPath: /cache
        {{- if not $cache }}
        subPath: .cache
        {{- end }}
      - name: tmp
        mountPath: /tmp
      - name: shm
        mountPath: /dev/shm
      {{- with $values.extra.mounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
{{- if .gpu }}
{{- with $values.scheduling.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with $values.gpu.claims }}
resourceClaims:
  {{- range . }}
  - name: {{ .name | quote }}
    {{- if .template }}
    resourceClaimTemplateName: {{ .template | quote }}
    {{- else }}
    resourceClaimName: {{ .claim | quote }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}
volumes:
  - name: spec
    configMap:
      name: {{ .config | quote }}
  - name: work
    {{- include "lorajob.workVolume" .root | nindent 4 }}
  {{- if $cache }}
  - name: cache
    persistentVolumeClaim:
      claimName: {{ $cache | quote }}
  {{- end }}
  - name: tmp
    emptyDir:
      sizeLimit: {{ int $values.tmp.sizeGi }}Gi
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ int $values.sharedMemory.sizeGi }}Gi
  {{- with $values.extra.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "lorajob.workVolume" -}}
{{- $work := .Values.work -}}
{{- if eq $work.kind "claim" -}}
persistentVolumeClaim:
  claimName: {{ include "lorajob.workClaim" . | quote }}
{{- else if eq $work.kind "ephemeral" -}}
ephemeral:
  volumeClaimTemplate:
    metadata:
      labels:
        {{- include "lorajob.labels" . | nindent 8 }}
    spec:
      {{- include "lorajob.claimSpec" $work | nindent 6 }}
{{- else -}}
emptyDir:
  sizeLimit: {{ int $work.sizeGi }}Gi
{{- end }}
{{- end }}

{{/* A claim's spec, from `work` or `cache`. */}}
{{- define "lorajob.claimSpec" -}}
accessModes: {{ toJson .accessModes }}
{{- with .storageClass }}
storageClassName: {{ . | quote }}
{{- end }}
resources:
  requests:
    storage: {{ int .sizeGi }}Gi
{{- end }}

{{/* The port that the spec has metrics served on; empty for none. */}}
{{- define "lorajob.metricsPort" -}}
{{- with .Values.spec.observe -}}
{{- with .metrics_port -}}
{{ int . }}
{{- end }}
{{- end }}
{{- end }}

{{/* The spec's own time between SIGTERM and the end. */}}
{{- define "lorajob.grace" -}}
{{- $limits := .Values.spec.limits | default dict -}}
{{- if hasKey $limits "grace_seconds" -}}
{{ int $limits.grace_seconds }}
{{- else -}}
{{ include "lorajob.defaultGrace" . }}
{{- end }}
{{- end }}

{{/* Not empty where no checkpoint outlives the pod: the first folder or bucket that results go to
has them, too; the Hub has not. */}}
{{- define "lorajob.losesCheckpoints" -}}
{{- $checkpoints := .Values.spec.checkpoints | default dict -}}
{{- $kept := or (eq .Values.work.kind "claim") (get $checkpoints "to") -}}
{{- range .Values.spec.publish -}}
{{- if and (kindIs "string" .) (not (regexMatch "^(hub|hf)://" .)) -}}
{{- $kept = true -}}
{{- end -}}
{{- end -}}
{{- if not $kept }}true{{ end -}}
{{- end }}

{{- define "lorajob.resources" -}}
{{- $values := .root.Values -}}
{{- /* What is written to the node's disk: temporary files, a GiB of logs, and the run's folder
       where it is no volume. */ -}}
{{- $disk := add 1 (int $values.tmp.sizeGi) -}}
{{- if eq $values.work.kind "emptyDir" -}}
{{- $disk = add $disk (int $values.work.sizeGi) -}}
{{- end -}}
requests:
  cpu: {{ $values.resources.requests.cpu | quote }}
  memory: {{ $values.resources.requests.memory | quote }}
  ephemeral-storage: {{ $disk }}Gi
  {{- if and .gpu (gt (int $values.gpu.count) 0) }}
  {{ $values.gpu.resource }}: {{ int $values.gpu.count }}
  {{- end }}
limits:
  {{- with $values.resources.limits.cpu }}
  cpu: {{ . | quote }}
  {{- end }}
  memory: {{ $values.resources.limits.memory | quote }}
  ephemeral-storage: {{ $disk }}Gi
  {{- if and .gpu (gt (int $values.gpu.count) 0) }}
  {{ $values.gpu.resource }}: {{ int $values.gpu.count }}
  {{- end }}
{{- if and .gpu $values.gpu.claims }}
claims:
  {{- range $values.gpu.claims }}
  - name: {{ .name | quote }}
    {{- with .request }}
    request: {{ . | quote }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Nodes with the right GPU. */}}
{{- define "lorajob.gpuPlacement" -}}
{{- $gpu := .Values.gpu -}}
{{- if or $gpu.products (gt (int $gpu.minMemoryMiB) 0) }}
affinity:
  nodeAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      nodeSelectorTerms:
        - matchExpressions:
            {{- with $gpu.products }}
            - key: {{ $gpu.productLabel | quote }}
              operator: In
              values: {{ toJson . }}
            {{- end }}
            {{- if gt (int $gpu.minMemoryMiB) 0 }}
            - key: {{ $gpu.memoryLabel | quote }}
              operator: Gt
              values: [{{ sub (int $gpu.minMemoryMiB) 1 | toString | quote }}]
            {{- end }}
{{- end }}
{{- end }}

{{- define "lorajob.tolerations" -}}
{{- $gpu := .Values.gpu -}}
{{- $found := .Values.scheduling.tolerations -}}
{{- if and $gpu.taint (or $gpu.claims (gt (int $gpu.count) 0)) -}}
{{- $found = prepend $found (dict "key" $gpu.taint "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- with $found }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
