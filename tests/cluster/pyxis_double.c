/* Stands in for NVIDIA's pyxis in tests: a SPANK plugin that the real srun and sbatch load.
 *
 *   plugstack.conf: required pyxis_double.so IMAGES LOG
 *
 * It knows the options that slurm/lib.sh uses, so that srun refuses a misspelt one, and gives the task
 * what they promise: the directory IMAGES/<reference with / # : as +> (or a path) for a root, with the
 * mounts, in the work directory. It says nothing about registries, squashfs, user namespaces, hooks,
 * entry points, or which variables an image sets.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

SPANK_PLUGIN(pyxis_double, 1)

enum option { IMAGE, MOUNTS, WORKDIR, ENVIRONMENT, NO_HOME, COUNT };
static char *given[COUNT];
static char images[PATH_MAX], log_path[PATH_MAX];

static int take(int option, const char *value, int remote)
{
	(void)remote;
	if (option != NO_HOME && (!value || !*value)) {
		slurm_error("pyxis_double: an option has no value");
		return -1;
	}
	given[option] = strdup(option == NO_HOME ? "yes" : value);
	return 0;
}

static struct spank_option table[] = {
	{ "container-image", "REFERENCE", "root file system", 1, IMAGE, take },
	{ "container-mounts", "SRC:DST[:ro],...", "bind mounts", 1, MOUNTS, take },
	{ "container-workdir", "PATH", "work directory", 1, WORKDIR, take },
	{ "container-env", "NAME,...", "variables that the image may not set", 1, ENVIRONMENT, take },
	{ "no-container-mount-home", NULL, "no home", 0, NO_HOME, take },
	SPANK_OPTIONS_TABLE_END
};

int slurm_spank_init(spank_t spank, int count, char **arguments)
{
	if (count > 0) snprintf(images, sizeof images, "%s", arguments[0]);
	if (count > 1) snprintf(log_path, sizeof log_path, "%s", arguments[1]);
	if (spank_context() == S_CTX_SLURMD) return 0;
	for (struct spank_option *one = table; one->name; one++)
		if (spank_option_register(spank, one) != ESPANK_SUCCESS) return -1;
	return 0;
}

static int refuse(const char *what, const char *value)
{
	slurm_error("pyxis_double: %s %s: %s", what, value, strerror(errno));
	return -1;
}

static void make_target(char *path, int is_folder)
{
	for (char *slash = path + 1; (slash = strchr(slash, '/')); slash++) {
		*slash = 0;
		mkdir(path, 0755);
		*slash = '/';
	}
	if (is_folder) mkdir(path, 0755);
	else close(open(path, O_CREAT | O_WRONLY, 0644));
}

static int bind_mount(const char *root, const char *source, const char *target, int read_only)
{
	struct stat status;
	char path[2 * PATH_MAX];
	if (stat(source, &status)) return refuse("mount", source);
	snprintf(path, sizeof path, "%s%s", root, target);
	make_target(path, S_ISDIR(status.st_mode));
	if (mount(source, path, NULL, MS_BIND | MS_REC, NULL)) return refuse("mount", path);
	if (read_only && mount(NULL, path, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL))
		return refuse("remount", path);
	return 0;
}

static int mount_all(const char *root)
{
	static const char *const always[] = { "/proc", "/dev", "/etc/hosts" };
	char *rest, *list = strdup(given[MOUNTS] ? given[MOUNTS] : "");
	for (size_t i = 0; i < sizeof always / sizeof *always; i++)
		if (bind_mount(root, always[i], always[i], 0)) return -1;
	for (char *one = strtok_r(list, ",", &rest); one; one = strtok_r(NULL, ",", &rest)) {
		char *target = strchr(one, ':'), *flags = NULL;
		if (target) {
			*target++ = 0;
			if ((flags = strchr(target, ':'))) *flags++ = 0;
		}
		if (bind_mount(root, one, target ? target : one, flags && !strcmp(flags, "ro"))) return -1;
	}
	free(list);
	return 0;
}

int slurm_spank_task_init_privileged(spank_t spank, int count, char **arguments)
{
	char root[2 * PATH_MAX];
	FILE *log;
	(void)spank, (void)count, (void)arguments;
	if (!given[IMAGE]) return 0;
	if ((log = fopen(log_path, "a"))) {
		fprintf(log, "image=%s mounts=%s workdir=%s env=%s no_home=%s\n", given[IMAGE],
			given[MOUNTS] ? given[MOUNTS] : "", given[WORKDIR] ? given[WORKDIR] : "",
			given[ENVIRONMENT] ? given[ENVIRONMENT] : "", given[NO_HOME] ? given[NO_HOME] : "no");
		fclose(log);
	}
	if (*given[IMAGE] == '/') snprintf(root, sizeof root, "%s", given[IMAGE]);
	else {
		int start = snprintf(root, sizeof root, "%s/", images);
		snprintf(root + start, sizeof root - start, "%s", given[IMAGE]);
		for (char *c = root + start; *c; c++)
			if (strchr("/#:", *c)) *c = '+';
	}
	if (access(root, X_OK)) return refuse("image", given[IMAGE]);
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return refuse("unshare", root);
	if (mount_all(root)) return -1;
	if (chroot(root) || chdir("/")) return refuse("chroot", root);
	return 0;
}

int slurm_spank_task_init(spank_t spank, int count, char **arguments)
{
	const char *folder = given[WORKDIR] ? given[WORKDIR] : "/";
	(void)spank, (void)count, (void)arguments;
	if (given[IMAGE] && chdir(folder)) return refuse("workdir", folder);
	return 0;
}
